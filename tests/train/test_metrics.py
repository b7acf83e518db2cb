from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakor.config.schema import LoggingConfig, WandbMode
from megakor.train.metrics import METRICS, Metrics, Throughput, next_attempt, read_metrics

QUIET = LoggingConfig(wandb=WandbMode.disabled)


def attempt(run: Path, losses: list[float]) -> int:
    number = next_attempt(run)
    with Metrics(run, "시험", QUIET, {}, number) as metrics:
        metrics.write("start", 0, world_size=1)
        for step, loss in enumerate(losses, 1):
            metrics.write("train", step, loss=loss)
    return number


def test_records_are_read_as_written(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    assert next_attempt(tmp_path) == 1
    assert attempt(tmp_path, [3.0, 2.5]) == 1
    assert attempt(tmp_path, [2.0]) == 2
    assert read_metrics(tmp_path) == [
        {"kind": "start", "attempt": 1, "step": 0, "world_size": 1},
        {"kind": "train", "attempt": 1, "step": 1, "loss": 3.0},
        {"kind": "train", "attempt": 1, "step": 2, "loss": 2.5},
        {"kind": "start", "attempt": 2, "step": 0, "world_size": 1},
        {"kind": "train", "attempt": 2, "step": 1, "loss": 2.0},
    ]
    assert next_attempt(tmp_path) == 3


@settings(max_examples=50, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_every_bit(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    run = tmp_path_factory.mktemp("run")
    attempt(run, [value])
    assert struct.pack("d", read_metrics(run)[-1]["loss"]) == struct.pack("d", value)


def test_every_cut_of_the_last_line(tmp_path: Path) -> None:
    """A crash may cut a line off anywhere, in the middle of a character too; all that was whole is read."""
    with Metrics(tmp_path, "시험", QUIET, {}, 1) as metrics:
        metrics.write("start", 0)
        metrics.write("validation", 3, set="말뭉치", loss=1.5)
    whole = (tmp_path / METRICS).read_bytes()
    first = whole.index(b"\n") + 1
    expected: list[dict[str, Any]] = [json.loads(line) for line in whole.decode().splitlines()]
    for cut in range(first, len(whole)):
        run = tmp_path / str(cut)
        run.mkdir()
        (run / METRICS).write_bytes(whole[:cut])
        kept = expected[:1] if cut < len(whole) - 1 else expected
        assert read_metrics(run) == kept, whole[first:cut]
        assert attempt(run, [2.0]) == 2
        assert [record["kind"] for record in read_metrics(run)] == [*(r["kind"] for r in kept), "start", "train"], cut


def test_lines_are_flushed_as_they_come(tmp_path: Path) -> None:
    with Metrics(tmp_path, "시험", QUIET, {}, 1) as metrics:
        metrics.write("train", 1, loss=2.0)
        assert read_metrics(tmp_path)[0]["loss"] == 2.0


def test_a_diverged_run_leaves_a_file_that_any_reader_of_json_reads(tmp_path: Path) -> None:
    attempt(tmp_path, [float("nan"), float("inf")])

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    for line in (tmp_path / METRICS).read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_weights_and_biases_offline(tmp_path: Path) -> None:
    config = LoggingConfig(wandb=WandbMode.offline)
    with Metrics(tmp_path, "시험", config, {"train": {"num_steps": 3}}, 1) as metrics:
        metrics.write("train", 1, loss=2.0)
        metrics.write("validation", 1, set="heldout", loss=2.0)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_throughput() -> None:
    """By hand: 2,048 tokens in 0.5 s at 3 GFLOP a token are 12.288 TFLOP/s, 40.96 % of 30."""
    found = Throughput(seconds=0.5, tokens=2048, flops_per_token=3e9, peak_tflops=30.0).record()
    assert found == pytest.approx({"seconds": 0.5, "tokens_per_second": 4096.0, "tflops": 12.288, "mfu": 0.4096})
