"""The universal checkpoint: DeepSpeed's own engines load it, to the bit, and train on from there."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megakor.checkpoint.__main__ import run as act
from megakor.checkpoint.format import CheckpointManifest
from megakor.checkpoint.reader import CheckpointValues, model_config, resolve
from megakor.checkpoint.save import save_checkpoint
from megakor.checkpoint.universal import STATES, export_universal
from megakor.config.compose import main
from megakor.config.resolved import plain
from megakor.config.schema import ExportUniversalConfig
from megakor.model.gpt_neox import GPTNeoXForCausalLM
from megakor.model.loss import token_losses
from megakor.model.specs import WHOLE, parameter_specs
from megakor.train.optimizer import Piece
from tests.checkpoint.pieces import edit, save
from tests.config.commands import command
from tests.distributed.runs import TIED
from tests.model.configs import small
from tests.ranks import run_ranks
from tests.resident import give_back_freed_blocks, peak_resident_size, resident_size
from tests.train.engines import CLIP, LR, NUM_TOKENS, by_hand, config_of, make_engine, tokens, train

NUM_STEPS = 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "가 dp2": {},
    "tp2": {"parallel__tensor_parallel_size": 2},
    "tied": TIED,
}
"""What saves: runs of two ranks."""


def train_and_save(folder: Path) -> None:
    """Three steps in each layout; every rank of two calls."""
    for name, changes in LAYOUTS.items():
        config = config_of(**changes)
        engine = make_engine(config)
        train(engine, NUM_STEPS)
        optimizer = {"name": "adamw", **engine.optimizer_state()}
        manifest = CheckpointManifest(NUM_STEPS, NUM_TOKENS, plain(engine.model), "지문", optimizer, {}, plain(config))
        save_checkpoint(folder / name, manifest, engine.pieces)
        dist.barrier()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder for each layout, and under `out` what was exported."""
    made = tmp_path_factory.mktemp("보편")
    run_ranks(train_and_save, 2, made)
    for name in LAYOUTS:
        export_universal(ExportUniversalConfig(run=str(made / name), out=str(made / "out" / name)))
    return made


def groups_of(model: GPTNeoXForCausalLM, decays: dict[str, bool], count: int) -> list[dict[str, Any]]:
    """Parameters that decay and those that do not; or all in one group."""
    if count == 1:
        return [{"params": list(model.parameters()), "weight_decay": 0.1}]
    return [
        {"params": [p for name, p in model.named_parameters() if decays[name] is group], "weight_decay": 0.1 * group}
        for group in (True, False)
    ]


def loaded(out: Path, checkpoint: Path, stage: int, num_groups: int, bf16: bool, scheduled: bool) -> Any:
    """A DeepSpeed engine over the whole model, loaded from `out`; every rank calls."""
    import deepspeed

    model = model_config(CheckpointManifest.load(checkpoint))
    torch.manual_seed(1)
    module = GPTNeoXForCausalLM(model)
    groups = groups_of(module, {spec.name: spec.decays for spec in parameter_specs(model)}, num_groups)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIP,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "contiguous_gradients": False, "memory_efficient_linear": False},
        "checkpoint": {"load_universal": True},
    }
    if scheduled:
        settings["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1.0)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    _, engine.client_state = engine.load_checkpoint(str(out))
    return engine


def differing(engine: Any, checkpoint: Path) -> list[str]:
    """State tensors that differ from the checkpoint's in any bit; every rank calls."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = []
    with CheckpointValues(checkpoint) as values:
        for name, parameter in engine.module.named_parameters():
            for theirs, ours in STATES.items():
                full = safe_get_full_fp32_param(parameter) if theirs == "fp32" else None
                full = safe_get_full_optimizer_state(parameter, theirs) if full is None else full
                expected = values.read(ours, name, 0, full.numel()).view(full.shape)
                if full.dtype is not torch.float32 or not torch.equal(full, expected):
                    found.append(f"{theirs} of {name}")
        if len(values.manifest.tensors) != len(STATES) * len(list(engine.module.parameters())):
            found.append("the number of tensors")
    return found


def step_on(engine: Any, step: int) -> float:
    """One step on this rank's rows of the batch that megakor's tests make; the global loss."""
    ids, mask = (torch.from_numpy(array) for array in tokens(step))
    rows = slice(dist.get_rank(), None, dist.get_world_size())
    losses = token_losses(engine(ids[rows, :-1]), ids[rows, 1:], NUM_TOKENS) * mask[rows]
    loss = losses.sum() * dist.get_world_size() / mask.sum()  # DeepSpeed averages the ranks' gradients
    engine.backward(loss)
    engine.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def load_and_step(
    out: Path, checkpoint: Path, stage: int, num_groups: int, bf16: bool = False, scheduled: bool = False
) -> dict[str, Any]:
    engine = loaded(out, checkpoint, stage, num_groups, bf16, scheduled)
    base = engine.optimizer.optimizer
    found: dict[str, Any] = {
        "differing": differing(engine, checkpoint),
        "updates": [float(state["step"]) for state in base.state.values()],
        "counters": (engine.global_steps, engine.skipped_steps),
        "decay": [group["weight_decay"] for group in base.param_groups],
        "client": engine.client_state["megakor"],
        "scheduler": engine.lr_scheduler.last_batch_iteration if scheduled else None,
    }
    if not bf16:
        found["loss"] = step_on(engine, NUM_STEPS)
        found["weights"] = {name: p.detach().numpy().copy() for name, p in engine.module.named_parameters()}
        found["updates after"] = [float(state["step"]) for state in base.state.values()]
    return found


@pytest.mark.parametrize(
    ("name", "world_size", "stage", "num_groups"),
    [("가 dp2", 1, 1, 2), ("가 dp2", 2, 1, 2), ("tp2", 2, 1, 2), ("tied", 2, 2, 1)],
)
def test_deepspeed_trains_on(folder: Path, name: str, world_size: int, stage: int, num_groups: int) -> None:
    checkpoint = resolve(folder / name)
    ranks = run_ranks(load_and_step, world_size, folder / "out" / name, checkpoint, stage, num_groups)
    for found in ranks:
        assert found["differing"] == []
        assert found["updates"] == [NUM_STEPS] * num_groups
        assert found["updates after"] == [NUM_STEPS + 1] * num_groups
        assert found["counters"] == (NUM_STEPS, 0)
        assert found["decay"] == [0.1, 0.0][:num_groups]
        assert found["client"]["tokenizer_fingerprint"] == "지문"
        assert found["client"]["train"]["parallel"]["zero_stage"] == 1
    if num_groups == 2:  # the next step is megakor's own
        results, weights = by_hand(config_of(**LAYOUTS[name]), NUM_STEPS + 1)
        assert ranks[0]["loss"] == pytest.approx(results[-1].loss, rel=1e-5)
        for key, weight in weights.items():
            torch.testing.assert_close(torch.from_numpy(ranks[0]["weights"][key]), weight, rtol=1e-4, atol=1e-5)


def test_into_bf16_with_a_schedule(folder: Path) -> None:
    """Masters and moments are fp32 there, too; a schedule of DeepSpeed's goes on after the steps that were done."""
    for found in run_ranks(load_and_step, 2, folder / "out" / "가 dp2", resolve(folder / "가 dp2"), 1, 2, True, True):
        assert found["differing"] == []
        assert found["updates"] == [NUM_STEPS] * 2
        assert found["scheduler"] == NUM_STEPS - 1


def refusal(out: Path, checkpoint: Path, stage: int) -> str:
    """How DeepSpeed's loader ends where it cannot load."""
    try:
        loaded(out, checkpoint, stage, 2, False, False)
    except (AssertionError, AttributeError) as error:
        return type(error).__name__
    return "loaded"


@pytest.mark.parametrize(("stage", "error"), [(0, "AttributeError"), (3, "AssertionError")])
def test_what_deepspeed_cannot_load_ends_in_an_error(folder: Path, stage: int, error: str) -> None:
    """docs/checkpoints.md says so. Under ZeRO-3 its groups would share one count of updates, so no file is there."""
    assert run_ranks(refusal, 1, folder / "out" / "가 dp2", resolve(folder / "가 dp2"), stage) == [error]


def test_the_files(folder: Path) -> None:
    out = folder / "out" / "tp2"
    assert (out / "latest_universal").read_text() == "global_step3"
    specs = {
        spec.name: spec for spec in parameter_specs(model_config(CheckpointManifest.load(resolve(folder / "tp2"))))
    }
    tag = out / "global_step3"
    assert {path.name for path in tag.iterdir()} == {"zero", "mp_rank_00_model_states.pt"}
    assert {path.name for path in (tag / "zero").iterdir()} == {*specs, "optimizer_state.pt"}
    for path in tag.rglob("*.pt"):
        torch.load(path, weights_only=True)  # refuses whatever is no tensor and no plain value
    for name, spec in specs.items():
        files = {path.name for path in (tag / "zero" / name).iterdir()}
        assert files == {"fp32.pt", "exp_avg.pt", "exp_avg_sq.pt", "step.pt"}
        saved = torch.load(tag / "zero" / name / "fp32.pt")
        assert saved["cat_dim"] == (spec.shard_dim or 0)
        assert saved["param"].shape == spec.shape
        assert saved.get("vocab_tensor", False) is (name in ("gpt_neox.embed_in.weight", "embed_out.weight"))


def test_without_deepspeed(folder: Path, tmp_path: Path) -> None:
    """By the command line, where DeepSpeed cannot be imported."""
    code = "import sys; sys.modules['deepspeed'] = None; from megakor.cli import main; main()"
    done = command("-c", code, "checkpoint", "export-universal", f"run={folder / 'tied'}", f"out={tmp_path / '밖'}")
    assert done.returncode == 0, done.stderr
    theirs, ours = tmp_path / "밖", folder / "out" / "tied"
    names = [path.relative_to(ours) for path in sorted(ours.rglob("*")) if path.is_file()]
    assert names == [path.relative_to(theirs) for path in sorted(theirs.rglob("*")) if path.is_file()]


# ---------------------------------------------------------------------------------------------------- refusals


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main("checkpoint export-universal", act, [str(argument) for argument in arguments])
    assert ended.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("megakor checkpoint export-universal: error: ")
    return line


def test_refusals(tmp_path: Path, alone: None, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save(tmp_path / "run", 10)
    run = f"run={tmp_path / 'run'}"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for out in ("full", "full/mine"):
        assert f"{out} must be a new or an empty folder" in failed(capsys, run, f"out={tmp_path / out}")
    assert "must be a run folder or a checkpoint folder" in failed(capsys, f"run={tmp_path / '없음'}", "out=o")
    assert "must hold at least one whole checkpoint" in failed(capsys, f"run={tmp_path / 'full'}", "out=o")
    edit(checkpoint, lambda raw: raw["optimizer"].update(name="adafactor"))
    assert "optimizer.name=adafactor must be adamw" in failed(capsys, run, f"out={tmp_path / 'new'}")
    edit(checkpoint, lambda raw: raw["optimizer"].update(name="adamw"))
    file = checkpoint / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    assert "SHA-256 differs" in failed(capsys, run, f"out={tmp_path / 'new'}")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "full"}


def test_whole_or_absent(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "run", 10)
    config = ExportUniversalConfig(run=str(tmp_path / "run"), out=str(tmp_path / "out"))
    real, count = torch.save, 0

    def full(content: object, path: Path) -> None:
        nonlocal count
        count += 1
        if count > 20:
            raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")
        real(content, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"out=.*PytorchStreamWriter failed writing file; nothing was exported"):
        export_universal(config)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OSError, match=r"the tensors need [\d,]+ bytes, and 10 are free"):
        export_universal(config)
    monkeypatch.undo()
    (tmp_path / ".out.partial").mkdir()  # left by one that was killed
    (tmp_path / "out").mkdir()
    export_universal(config)
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]


# ------------------------------------------------------------------------------------------------------ memory

BIG = small(vocab_size=16384, hidden_size=256, num_attention_heads=4, intermediate_size=1024, num_hidden_layers=8)
"""Its state has 176 MB, the largest tensor 16.8 MB."""


def save_big(folder: Path) -> None:
    """A checkpoint of `BIG`."""
    pieces = [
        Piece(state, spec.name, spec.shape, WHOLE, 0, torch.zeros(spec.shape).view(-1), True)
        for spec in parameter_specs(BIG)
        for state in STATES.values()
    ]
    optimizer = {"name": "adamw", "groups": [], "steps": 1, "loss_scale": None}
    save_checkpoint(folder / "run", CheckpointManifest(1, 90, asdict(BIG), "", optimizer, {}, {}), pieces)


def peak_of_export(folder: Path) -> int:
    """Bytes of host memory that an export takes."""
    give_back_freed_blocks()
    resolve(folder / "run")  # Arrow takes 68 MB for itself when it is first used
    before = resident_size()
    export_universal(ExportUniversalConfig(run=str(folder / "run"), out=str(folder / "out")))
    return peak_resident_size() - before


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    run_ranks(save_big, 1, tmp_path)
    (peak,) = run_ranks(peak_of_export, 1, tmp_path)
    print(f"peak of the export: {peak / 1e6:.1f} MB")
    assert peak < 60e6  # the tensor, what was read of it, and a little; the checkpoint has 176 MB
