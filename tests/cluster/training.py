"""A tiny pretraining run that hosts make together, and what becomes of it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from megakor.drill.drill import TINY
from megakor.train.exit_record import ExitRecord, read_exit
from megakor.train.metrics import read_metrics
from tests.cluster.hosts import INTERFACE, Cluster, Host, end, wait_for
from tests.distributed.runs import Made

NUM_STEPS = 40
PAIR_LENGTH = 256
"""Tokens that instruction pairs fit into."""
TOLERANCE = 1e-6
"""Of losses in fp32, relative: other numbers of ranks add in another order. 2.5e-7 was measured."""


def overrides(made: Made, run: Path) -> list[str]:
    """A run of 40 steps that saves every 10."""
    return [
        *TINY, "checkpoint.restart_interval=0", f"train.num_steps={NUM_STEPS}", f"run={run}",
        f"model.max_position_embeddings={PAIR_LENGTH}",
        f"data.train={made.train}", f"data.tokenizer={made.tokenizer}",
    ]  # fmt: skip


@dataclass
class Started:
    """A command on a host that trains.

    Attributes:
        log: what it writes, to both streams.
    """

    process: subprocess.Popen[str]
    run: Path
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float = 120.0) -> int:
        """Its exit status."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            end(self.process)
            pytest.fail(f"no end after {timeout} s:\n{self.said()[-4000:]}")

    def until(self, step: int, starts: int = 1, timeout: float = 90.0) -> None:
        """Wait until its so many-th start has logged a step."""

        def reached() -> bool:
            assert self.process.poll() is None, self.said()[-4000:]
            records = read_metrics(self.run)
            begun = sum(record["kind"] == "start" for record in records)
            return begun >= starts and any(r["kind"] == "train" and r["step"] >= step for r in records)

        wait_for(reached, timeout, every=0.05)

    def finishes(self, world_size: int = 2) -> None:
        """Wait until it has; AssertionError unless all ranks took part to the end."""
        assert self.wait() == 0, self.said()[-4000:]
        assert read_exit(self.run) == ExitRecord("finished", "", NUM_STEPS, f"step-{NUM_STEPS:08d}", world_size)
        assert "Traceback" not in self.said()


def megakor(host: Host, run: Path, verb: str, *words: str, **options: Any) -> Started:
    """`megakor` on a host, from the folder above the run's."""
    log = run.with_name(f"{run.name} on {host.name}.txt")
    command = [sys.executable, "-m", "megakor", *verb.split(), *words]
    with log.open("a") as output:
        return Started(host.start(*command, cwd=run.parent, stdout=output, stderr=output, **options), run, log)


def launch(host: Host, made: Made, run: Path, *words: str, **options: Any) -> Started:
    """`megakor launch pretrain` on a host, over the interface that all hosts have."""
    return megakor(
        host, run, "launch pretrain", *overrides(made, run), f"cluster.interface={INTERFACE}", *words, **options
    )


def ranks(hosts: Iterable[Host]) -> dict[str, list[psutil.Process]]:
    """The processes that train on each host."""
    return {host.name: [process for process in host.processes() if trains(process)] for host in hosts}


def trains(process: psutil.Process) -> bool:
    """Whether it is a rank, and not a launcher that names one."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    is_python = bool(words) and Path(words[0]).name.startswith("python")
    return is_python and "-m" in words and words[words.index("-m") + 1] == "megakor.pretrain"


def steps(run: Path) -> dict[int, dict[str, Any]]:
    """The record of every step, the last start's where a step was repeated."""
    return {record["step"]: record for record in read_metrics(run) if record["kind"] == "train"}


def starts(run: Path) -> list[tuple[int, int]]:
    """(step that it went on from, ranks) of every start."""
    return [(record["step"], record["world_size"]) for record in read_metrics(run) if record["kind"] == "start"]


def goes_on_without_the_second(hosts: Cluster, started: Started, undisturbed: Path) -> None:
    """Of three hosts with a rank each, let the second die; the run goes on without it, as if nothing had been."""
    started.until(step=12)
    hosts.hosts["node-2"].die()
    died = time.monotonic()
    started.until(step=NUM_STEPS - 10, starts=2)
    print(f"{time.monotonic() - died:.1f} s from the death of a node to the steps of the next start")
    assert {name: len(found) for name, found in ranks([hosts[1], hosts[3]]).items()} == {"node-1": 1, "node-3": 1}
    started.finishes(world_size=2)
    (first, size), (resumed, left) = starts(started.run)
    assert (first, size, left) == (0, 3, 2)
    assert resumed >= 10
    assert_as_undisturbed(started.run, undisturbed)


def assert_as_undisturbed(run: Path, undisturbed: Path) -> None:
    """Every step saw the same tokens, and its loss is the same."""
    found, expected = steps(run), steps(undisturbed)
    assert list(found) == list(expected) == list(range(1, NUM_STEPS + 1))
    for step, record in expected.items():
        assert found[step]["batch_digest"] == record["batch_digest"], step
        assert found[step]["loss"] == pytest.approx(record["loss"], rel=TOLERANCE), step
