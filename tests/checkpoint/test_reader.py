from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megakor.checkpoint.format import LATEST, committed, step_folder
from megakor.checkpoint.reader import CheckpointValues, load_model, newest_whole, read_weights, resolve, run_of
from megakor.model.gpt_neox import GPTNeoXForCausalLM
from tests.checkpoint.pieces import MODEL, NUM_TOKENS, save, save_cut, state
from tests.ranks import run_ranks

CUTS = range(2)


def save_all(run: Path) -> list[Path]:
    return [save_cut(run / str(seed), 5, seed) for seed in CUTS]


@pytest.fixture(scope="module")
def cut_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same state, cut in several ways and written by two and three ranks."""
    found = []
    for world_size in (2, 3):
        run = tmp_path_factory.mktemp(f"ranks{world_size}")
        answers = run_ranks(save_all, world_size, run)
        assert all(answer == answers[0] for answer in answers)
        found += answers[0]
    return found


def test_every_cut_reads_as_the_whole(cut_folders: list[Path]) -> None:
    whole = state()
    for folder in cut_folders:
        with CheckpointValues(folder) as values:
            values.manifest.check_contents(folder)
            assert values.optimizer_steps == 4
            assert values.loss_scale == {}
            for (kind, name), tensor in whole.items():
                assert torch.equal(values.read(kind, name, 0, tensor.numel()), tensor.view(-1))
            assert {f"{kind}/{name}" for kind, name in whole} == set(values.manifest.tensors)
    assert len({tuple(folder.glob("*.safetensors")) for folder in cut_folders}) == len(cut_folders)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_range_of_any_cut(cut_folders: list[Path], data: st.DataObject) -> None:
    folder = data.draw(st.sampled_from(cut_folders))
    whole = state()
    kind, name = data.draw(st.sampled_from(sorted(whole)))
    start = data.draw(st.integers(0, whole[kind, name].numel()))
    stop = data.draw(st.integers(start, whole[kind, name].numel()))
    with CheckpointValues(folder) as values:
        assert torch.equal(values.read(kind, name, start, stop), whole[kind, name].view(-1)[start:stop])


def test_what_is_not_there(cut_folders: list[Path]) -> None:
    with CheckpointValues(cut_folders[0]) as values:
        with pytest.raises(ValueError, match=r"weight/embed_out.weight must be there with at least 1025 elements"):
            values.weight("embed_out.weight", 0, 64 * 16 + 1)
        with pytest.raises(ValueError, match=r"exp_avg_sq_row/embed_out\.weight must be there"):
            values.read("exp_avg_sq_row", "embed_out.weight", 0, 1)


def test_weights_without_the_optimizer(cut_folders: list[Path]) -> None:
    with CheckpointValues(cut_folders[0], with_optimizer=False) as values:
        assert (values.optimizer_steps, values.loss_scale) == (0, None)
        moment = torch.ones(6)
        values.fill(moment, "exp_avg", "embed_out.weight", 3)
        assert not moment.any()
        assert torch.equal(values.weight("embed_out.weight", 3, 9), state()["weight", "embed_out.weight"].view(-1)[3:9])


def test_whole_weights_and_the_model(cut_folders: list[Path]) -> None:
    whole = {name: tensor for (kind, name), tensor in state().items() if kind == "weight"}
    for folder in cut_folders:
        weights = read_weights(folder)
        assert weights.keys() == whole.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in whole.items())
    model, manifest = load_model(cut_folders[-1])
    expected = GPTNeoXForCausalLM(MODEL)
    expected.load_state_dict(whole)
    ids = torch.arange(30).view(2, 15)
    with torch.no_grad():
        assert torch.equal(model(ids), expected(ids))
    assert not model.training
    assert manifest.num_tokens == NUM_TOKENS
    assert load_model(cut_folders[0], dtype=torch.bfloat16)[0].embed_out.weight.dtype == torch.bfloat16


def test_resolve(tmp_path: Path, alone: None) -> None:
    run = tmp_path / "실행"
    folders = [save(run, step) for step in (5, 10, 100_000_000)]
    assert resolve(run) == resolve(str(run)) == folders[-1]
    assert resolve(folders[0]) == folders[0]
    assert run_of(folders[0]) == run
    assert committed(run) == folders
    with pytest.raises(FileNotFoundError, match=r"run=.*없음 must be a run folder or a checkpoint folder"):
        resolve(tmp_path / "없음")
    (tmp_path / "빈").mkdir()
    with pytest.raises(ValueError, match=r"run=.*빈 must hold at least one whole checkpoint"):
        resolve(tmp_path / "빈")


def test_steps_past_the_padding_are_still_the_newest(tmp_path: Path, alone: None) -> None:
    for step in (99_999_999, 100_000_000, 200_000_000):
        folder = save(tmp_path, step)
        assert newest_whole(tmp_path, contents=False) == folder


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no file", "no manifest"])
def test_damaged_ones_are_passed_over(
    tmp_path: Path, alone: None, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = save(tmp_path, 5), save(tmp_path, 10)
    file = second / "rank-00000.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "flipped":
        data = bytearray(file.read_bytes())
        data[-5] ^= 4
        file.write_bytes(data)
    elif damage == "no file":
        file.unlink()
    else:
        (second / "manifest.json").unlink()
    monkeypatch.setattr(logging.getLogger("megakor"), "propagate", True)
    assert newest_whole(tmp_path, contents=True) == first
    assert any("damaged" in record.message and str(second) in record.message for record in caplog.records)
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_a_folder_that_is_being_written_is_not_committed(tmp_path: Path, alone: None) -> None:
    first = save(tmp_path, 5)
    (tmp_path / "checkpoints" / "step-00000010.writing").mkdir()
    assert committed(tmp_path) == [first]
    assert (tmp_path / "checkpoints" / LATEST).read_text() == "step-00000005"
    assert step_folder(tmp_path, 5) == first
