"""What a run does about stops, spikes, steps that are not finite and replicas that differ: real runs on gloo ranks."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megakor.checkpoint.save as saving
from megakor.checkpoint.format import committed
from megakor.checkpoint.reader import newest_whole
from megakor.config.schema import OnSpike, PretrainConfig
from megakor.data.skips import Skip, add_skip, merged, read_skips
from megakor.train.engine import Engine, StepResult
from megakor.train.exit_record import ExitRecord, read_exit
from megakor.train.metrics import read_metrics
from tests.distributed.runs import Job, Made, configuration, curve, run_job, zero
from tests.ranks import run_ranks

Change = Callable[[Engine, int, Callable[[], StepResult]], StepResult]


def never_ending() -> None:
    time.sleep(1000)


@dataclass
class Trouble:
    """What befalls a step, numbered from 0: done by name, as ranks are other processes."""

    kind: str
    step: int
    rank: int = 1
    times: int = 1

    def befall(self, engine: Engine, run: Path, result: Callable[[], StepResult]) -> StepResult:
        mine = dist.get_rank() == self.rank
        if self.kind == "signal" and mine:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.kind == "file" and mine:
            (run / "STOP").touch()
        if self.kind == "usr1" and mine:
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.kind == "bit" and mine:
            parameter = dict(engine.built.named)["gpt_neox.final_layer_norm.weight"]
            with torch.no_grad():
                parameter.view(torch.int32)[3] ^= 1
        if self.kind == "master" and mine:
            for piece in engine.pieces:
                if (piece.state, piece.name) == ("weight", "gpt_neox.final_layer_norm.weight"):
                    piece.values.view(torch.int32)[3] ^= 1 << 12
        if self.kind == "hang" and mine:
            never_ending()
        if self.kind == "nan" and mine:
            engine.built.named[0][1].register_hook(lambda gradient: gradient * math.nan)
        found = result()
        if self.kind == "spike":
            return StepResult(found.loss + 5.0, found.grad_norm)
        return found


def run_with(config: PretrainConfig, trouble: Trouble) -> tuple[str | None, list[str]]:
    """A run to which trouble comes."""
    real, left = Engine.train_step, trouble.times

    def train_step(engine: Engine, batches: list, lr: float, step: int) -> StepResult:
        nonlocal left
        if trouble.step <= step and left:
            left -= 1
            return trouble.befall(engine, Path(config.run), lambda: real(engine, batches, lr, step))
        return real(engine, batches, lr, step)

    Engine.train_step = train_step  # type: ignore[method-assign]
    try:
        return run_job(Job(config))
    finally:
        Engine.train_step = real  # type: ignore[method-assign]


def run_pruning_slowly(config: PretrainConfig, trouble: Trouble) -> tuple[str | None, list[str]]:
    """The same; what removes old checkpoints is late."""
    real = saving.prune

    def late(*arguments: Any) -> list[Path]:
        time.sleep(0.5)
        return real(*arguments)

    saving.prune = late  # type: ignore[assignment]
    try:
        return run_with(config, trouble)
    finally:
        saving.prune = real


def run_both(configs: list[tuple[PretrainConfig, Trouble | None]]) -> list[tuple[str | None, list[str]]]:
    return [run_with(config, trouble) if trouble else run_job(Job(config)) for config, trouble in configs]


TP2 = {"parallel__tensor_parallel_size": 2}
STEPS: dict[str, Any] = {"checkpoint__interval": 4, "evaluation__interval": 12, "train__num_steps": 12}
ACT: dict[str, Any] = {"health__on_spike": OnSpike.act, "health__spike_window": 4, "health__spike_threshold": 20.0}
WHY = {"signal": "SIGTERM", "usr1": "SIGUSR1", "file": "the file STOP"}


@pytest.fixture(scope="module")
def ran(made: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str | None, list[str]]]]:
    """All runs on two ranks in one group: undisturbed; stopped, and gone on with; and the troubles."""
    folder = tmp_path_factory.mktemp("troubles")

    def config(name: str, **changes: Any) -> PretrainConfig:
        return configuration(made, folder / name, **STEPS | changes)

    jobs: dict[str, tuple[PretrainConfig, Trouble | None]] = {"whole": (config("whole"), None)}
    for kind, rank in (("signal", 1), ("usr1", 0), ("file", 1)):
        jobs[f"{kind} 1"] = (config(kind), Trouble(kind, 5, rank))
        jobs[f"{kind} 2"] = (config(kind), None)
    jobs |= {
        "nan": (config("nan", health__skip_limit=3), Trouble("nan", 5)),
        "bit": (config("bit", health__replica_check_interval=3, **zero(0)), Trouble("bit", 6)),
        "bit unseen": (config("bit unseen", **zero(0)), Trouble("bit", 6)),
        "tensor": (config("tensor", health__replica_check_interval=3, **TP2), Trouble("master", 6)),
        "sound": (config("sound", health__replica_check_interval=3, **TP2), None),
        "warned": (config("warned", **ACT | {"health__on_spike": OnSpike.warn}), Trouble("spike", 9)),
        "spike": (config("spike", **ACT), Trouble("spike", 9)),
        "spike again": (config("spike again", health__roll_back_limit=1, **ACT), Trouble("spike", 9, times=2)),
        "early": (config("early", health__spike_skip=9, **ACT), Trouble("spike", 9)),
        "skipped": (config("skipped", data__skip=[[64, 80]]), None),
    }  # fmt: skip
    answers, _ = run_ranks(run_both, 2, list(jobs.values()))
    return folder, dict(zip(jobs, answers, strict=True))


@pytest.mark.parametrize("kind", WHY)
def test_stopped_and_gone_on_with(ran: tuple[Path, dict], kind: str) -> None:
    """All ranks save at the same step boundary; the next start goes on from there, bit for bit."""
    folder, answers = ran
    assert [answers[f"{kind} {part}"][0] for part in (1, 2)] == [None, None]
    assert any(WHY[kind] in line and "step 6 is saved" in line for line in answers[f"{kind} 1"][1])
    starts = [record["step"] for record in read_metrics(folder / kind) if record["kind"] == "start"]
    assert starts == [0, 6]
    assert curve(folder / kind) == curve(folder / "whole")
    assert not (folder / kind / "STOP").exists()
    assert read_exit(folder / kind) == ExitRecord("finished", "", 12, "step-00000012", 2)
    # What was saved to stop is gone with the next one.
    assert [path.name for path in committed(folder / kind)] == [f"step-{step:08d}" for step in (4, 8, 12)]


def test_steps_that_are_not_finite_end_the_run(ran: tuple[Path, dict]) -> None:
    folder, answers = ran
    error, lines = answers["nan"]
    assert error is not None
    assert "were not in 3 steps in a row up to 8 (health.skip_limit=3)" in error
    assert sum("its loss or gradient is not finite; nothing is changed" in line for line in lines) == 3
    skipped = [r["step"] for r in read_metrics(folder / "nan") if r["kind"] == "train" and r.get("skipped")]
    assert skipped == [6, 7, 8]
    record = read_exit(folder / "nan")
    assert record is not None
    assert (record.outcome, record.step, record.checkpoint) == ("failed", 8, "step-00000004")
    assert "health.skip_limit" in record.reason


def test_a_flipped_bit_is_found(ran: tuple[Path, dict]) -> None:
    folder, answers = ran
    error, _ = answers["bit"]
    assert error is not None
    assert "comparing the replicas' weights after step 9" in error
    assert "gpt_neox.final_layer_norm.weight: ranks 0, 1 differ, and no majority says which" in error
    assert answers["bit unseen"][0] is None
    error, _ = answers["tensor"]
    assert error is not None
    assert "gpt_neox.final_layer_norm.weight: ranks 0, 1 differ" in error
    assert answers["sound"][0] is None
    assert [row[1:] for row in curve(folder / "bit unseen")] != [row[1:] for row in curve(folder / "whole")]


def spikes(run: Path) -> list[int]:
    return [record["step"] for record in read_metrics(run) if record["kind"] == "spike"]


def test_a_spike_is_told_of(ran: tuple[Path, dict]) -> None:
    folder, answers = ran
    assert answers["warned"][0] is None
    assert any("step 10: loss" in line and "deviations above the median" in line for line in answers["warned"][1])
    assert spikes(folder / "warned") == [10]
    assert [row[0] for row in curve(folder / "warned")] == list(range(1, 13))


def test_a_spike_is_gone_back_before(ran: tuple[Path, dict]) -> None:
    """From step 8 on without the samples of steps 9 and 10, as a run that was told to leave them out from the start."""
    folder, answers = ran
    assert answers["spike"][0] is None, answers["spike"][0]
    assert [(s.step, s.rolled_back_to, s.stretches) for s in read_skips(folder / "spike")] == [
        (10, 8, [[64, 72], [72, 80]])
    ]
    assert curve(folder / "spike") == curve(folder / "skipped")
    steps = [record["step"] for record in read_metrics(folder / "spike") if record["kind"] == "train"]
    assert steps == [*range(1, 11), *range(9, 13)]
    lines = (folder / "spike/skipped/step-00000010.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in lines} == {9, 10}
    assert all(json.loads(line)["document"] for line in lines)
    newest = newest_whole(folder / "spike", contents=True)
    assert newest is not None
    expected = newest_whole(folder / "skipped", contents=True)
    assert expected is not None
    for file in expected.glob("*.safetensors"):
        assert (newest / file.name).read_bytes() == file.read_bytes()


def test_a_checkpoint_that_is_being_removed_is_not_gone_back_to(made: Made, tmp_path: Path) -> None:
    """At the spike of step 11 the restart checkpoint of step 9 is on its way out, since that of step 10 is whole."""
    keys = {"checkpoint__restart_interval": 1, **ACT, **STEPS}
    config = configuration(made, tmp_path / "run", **keys)
    ((error, _),) = run_ranks(run_pruning_slowly, 1, config, Trouble("spike", 10, rank=0))
    assert error is None, error
    assert [(s.step, s.rolled_back_to) for s in read_skips(tmp_path / "run")] == [(11, 8)]


def test_no_oftener_than_allowed_and_not_without_a_checkpoint(ran: tuple[Path, dict]) -> None:
    folder, answers = ran
    assert answers["spike again"][0] is None
    assert len(read_skips(folder / "spike again")) == 1
    assert answers["early"][0] is None
    assert any("there is no checkpoint before it" in line for line in answers["early"][1])
    assert read_skips(folder / "early") == []


def resume_after(config: PretrainConfig) -> tuple[str | None, list[str]]:
    return run_job(Job(config))


def test_a_resume_repeats_what_was_left_out(ran: tuple[Path, dict], made: Made) -> None:
    folder, _ = ran
    longer = configuration(made, folder / "spike", **STEPS | {"train__num_steps": 14})
    expected = configuration(made, folder / "skipped", **STEPS | {"train__num_steps": 14, "data__skip": [[64, 80]]})
    answers, _ = run_ranks(run_both, 2, [(longer, None), (expected, None)])
    assert [error for error, _ in answers] == [None, None]
    assert curve(folder / "spike")[-2:] == curve(folder / "skipped")[-2:]


def test_a_hang_ends_the_run_and_names_the_rank(ran: tuple[Path, dict], made: Made) -> None:
    """Every rank writes its stacks; the next start goes on as if nothing had been."""
    folder, _ = ran
    config = configuration(made, folder / "hang", **STEPS | {"health__hang_seconds": 3.0})
    run_ranks(run_both, 2, [(config, Trouble("hang", 5))], killed=True)
    stacks = [(folder / f"hang/hang-rank-0000{rank}.txt").read_text() for rank in range(2)]
    assert "rank 1 in step 5 (training)" in stacks[1]
    assert "never_ending" in stacks[1]
    assert "rank 0 in step 5 (training)" in stacks[0]
    assert "train_step" in stacks[0]
    answers, _ = run_ranks(run_both, 2, [(config, None)])
    assert [error for error, _ in answers] == [None]
    assert curve(folder / "hang") == curve(folder / "whole")


def test_lists_of_what_was_left_out(tmp_path: Path) -> None:
    assert read_skips(tmp_path) == []
    add_skip(tmp_path, Skip(3, 1, [[0, 2]], "왜"))
    add_skip(tmp_path, Skip(9, 1, [[4, 5]], "왜"))
    assert [skip.step for skip in read_skips(tmp_path)] == [3, 9]
    assert merged([[5, 6], [1, 2]], [[2, 4], [5, 7]]) == [[1, 4], [5, 7]]
    (tmp_path / "skips.json").write_text("{")
    with pytest.raises(ValueError, match="skips.json: must be a run's list"):
        read_skips(tmp_path)
