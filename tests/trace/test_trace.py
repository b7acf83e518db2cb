"""`megakor trace` on the folder of a run: what it asks for, what it prints, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megakor.config.compose import main
from megakor.config.schema import TraceConfig
from megakor.data.build import build_shards
from megakor.trace.trace import load_run, trace, worst_steps
from tests.data.tokens import ByteTokenizer, shard_config

NUM_STEPS = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps over 60 documents, with a spike at step 23."""
    folder = tmp_path_factory.mktemp("실행")
    texts = [{"id": f"문서-{number}", "text": f"{number}번째 글. " * 5, "source": "잡지"} for number in range(60)]
    (folder / "a.jsonl").write_text("\n".join(json.dumps(text, ensure_ascii=False) for text in texts) + "\n")
    build_shards(shard_config([folder / "a.jsonl"], folder / "shards"), ByteTokenizer())
    train = {"num_steps": NUM_STEPS, "global_batch_size": 4, "micro_batch_size": 1, "sequence_length": 64}
    config = {"run": str(folder), "data": {"train": str(folder / "shards"), "tokenizer": "unused"}, "train": train}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    losses = [10 - 0.1 * step + (2.5 if step == 23 else 0) for step in range(1, NUM_STEPS + 1)]
    records = [{"kind": "train", "step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(autouse=True)
def _tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's folder holds a tokenizer; this one's is too simple to have files."""
    monkeypatch.setattr("megakor.trace.trace.Tokenizer.load", lambda folder: ByteTokenizer())


def asked(run: Path, capsys: pytest.CaptureFixture[str], **keys: Any) -> list[dict[str, Any]]:
    trace(TraceConfig(run=str(run), format="json", **keys))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_step_and_document_agree(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of a step's documents names the step, and no other document does."""
    batch = {record["document"] for record in asked(run, capsys, step=12)}
    assert batch <= {f"문서-{number}" for number in range(60)}
    for number in range(60):
        (found,) = asked(run, capsys, document=f"문서-{number}")
        assert found["source"] == ""
        assert (12 in found["steps"]) is (f"문서-{number}" in batch)


def test_a_passage_in_full(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = asked(run, capsys, step=1)[0]
    assert record.keys() == {"step", "row", "source", "shard", "number", "document", "origin", "start", "stop"}
    assert (record["step"], record["row"], record["origin"]) == (1, 0, "잡지")


def test_spikes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = asked(run, capsys, spikes=True, num_spikes=1)
    assert {(record["spike"], record["step"]) for record in records} == {(23, 23)}
    assert records[0]["skip"] == [[88, 92]]  # four samples a step
    assert records[0]["loss"] == pytest.approx(10.2)
    around = asked(run, capsys, spikes=True, num_spikes=1, around=2)
    assert sorted({record["step"] for record in around}) == [21, 22, 23, 24, 25]
    assert [record for record in around if record["step"] == 23] == records


def test_what_spikes_names_may_be_added_to_what_is_skipped(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a stretch within the step is skipped already; and the step's documents are then read no more."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    again = tmp_path / "again"
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("shards"))

    def skipping(skip: list[list[int]]) -> None:
        (again / "config.yaml").write_text(yaml.safe_dump({**config, "data": {**config["data"], "skip": skip}}))

    skipping([[90, 93]])
    records = asked(again, capsys, spikes=True, num_spikes=1)
    assert records[0]["skip"] == [[88, 90], [93, 95]]
    skipping(sorted([[90, 93], *records[0]["skip"]]))
    seen = [(record["shard"], record["number"], record["start"]) for record in asked(again, capsys, step=23)]
    assert not {(record["shard"], record["number"], record["start"]) for record in records} & set(seen)


def test_worst_steps_stand_out_from_those_before() -> None:
    falling = {step: 10.0 - step / 10 for step in range(1, 50)}
    assert [step for step, _ in worst_steps({**falling, 30: 12.0, 40: 10.0}, 2)] == [30, 40]


def test_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main("trace", lambda config: trace(config), [f"run={run}", "document=문서-7"])
    out = capsys.readouterr().out
    assert "문서-7" in out
    assert "steps" in out


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "one of step=, document= and spikes=true must be given, not none"),
    (["step=1", "spikes=true"], "must be given, not step and spikes"),
    (["step=0"], "step=0 must be above 0"),
    (["step=41"], "step=41 must be at most 40, the last that"),
    (["document=없음"], "document=없음 must be the id of a document"),
    (["step=1", "format=xml"], "format=xml must be table or json"),
])  # fmt: skip
def test_refused(run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        main("trace", trace, [f"run={run}", *arguments])
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert not any(line.startswith("Traceback") for line in error)


def test_folders_that_are_none(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must be the folder of a run: it has no config.yaml"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text("pairs: {files: []}\n")
    with pytest.raises(ValueError, match="must be a pretraining run"):
        load_run(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["train"] = str(tmp_path / "gone")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(FileNotFoundError, match=r"gone/manifest\.json: not there"):
        trace(TraceConfig(run=str(tmp_path), step=1))
