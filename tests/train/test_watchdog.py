from __future__ import annotations

import ctypes
import itertools
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megakor.parallel.roll_call import connect_store
from megakor.train import watchdog
from megakor.train.watchdog import EXIT_STATUS, LEFT, Stand, Watchdog, describe
from tests.ranks import _rank, context, free_port

SECONDS = 2.0


def watched(folder: Path) -> Watchdog:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    os.dup2(os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY), 2)
    return Watchdog(folder, SECONDS, connect_store if world_size > 1 else None, rank, world_size)


def train_step() -> None:
    dist.all_reduce(torch.ones(1))


def sleeping_for_ever() -> None:
    time.sleep(1000)


def looping_in_c_for_ever() -> None:
    ctypes.PyDLL(None).pause()  # a PyDLL keeps the interpreter's lock, unlike a CDLL


def steps_until(folder: Path, stop: Callable[[], None]) -> None:
    """Three steps, and in the middle of the fourth rank 1 stops."""
    with watched(folder) as dog:
        for step in range(1, 5):
            dog.beat(step)
            if step == 4 and dist.get_rank() == dist.get_world_size() - 1:
                time.sleep(1.5 * watchdog.POLL_SECONDS)  # for the beat to be told
                stop()
            train_step()


def sleeps(folder: Path) -> None:
    steps_until(folder, sleeping_for_ever)


def loops(folder: Path) -> None:
    steps_until(folder, looping_in_c_for_ever)


def lags(folder: Path) -> None:
    """Rank 1 sleeps in a step, rank 2 waits for it when it evaluates, and rank 0 goes on without an end."""
    with watched(folder) as dog:
        dog.beat(1)
        train_step()
        dog.beat(2)
        if dist.get_rank() == 1:
            sleeping_for_ever()
        dog.beat(2, "evaluating")
        if dist.get_rank() == 2:
            train_step()
        while True:
            dog.beat(2, "evaluating")
            time.sleep(0.1)


def leaves(folder: Path) -> None:
    """Rank 0 is through; rank 1 sleeps where it should have ended too."""
    with watched(folder) as dog:
        for step in range(1, 4):
            dog.beat(step)
            train_step()
        if dist.get_rank() == 1:
            sleeping_for_ever()
    dist.barrier()


def slow(folder: Path) -> None:
    """A first step of more than the limit, then steps of nearly as much in parts, with beats between."""
    with watched(folder) as dog:
        dog.beat(1)
        time.sleep(SECONDS + 3 * watchdog.POLL_SECONDS)
        for step in range(2, 4):
            for phase in ("training", "saving"):
                dog.beat(step, phase)
                train_step()
                time.sleep(SECONDS / 2)
    time.sleep(0.5)  # past what it watched


@dataclass
class Ended:
    """How the ranks of a job ended, and when (seconds since the epoch)."""

    folder: Path
    statuses: list[int | None]
    times: list[float]

    def log(self, rank: int) -> str:
        return (self.folder / f"{rank}.log").read_text()

    def stacks(self, rank: int) -> str:
        return (self.folder / f"hang-rank-{rank:05d}.txt").read_text()


JOBS: dict[Callable[[Path], None], int] = {sleeps: 3, loops: 2, lags: 3, leaves: 2, slow: 2}
"""Functions and their numbers of ranks."""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[Callable, Ended]:
    """All jobs, which run side by side: they do little but wait."""
    server = context()
    jobs, processes = {}, {}
    for job, world_size in JOBS.items():
        folder, port = tmp_path_factory.mktemp(job.__name__), free_port()
        senders = [server.Pipe(duplex=False) for _ in range(world_size)]
        processes[job] = [
            server.Process(target=_rank, args=(senders[rank][1], job, rank, world_size, port, (folder,)))
            for rank in range(world_size)
        ]
        for process in processes[job]:
            process.start()
        jobs[job] = Ended(folder, [None] * world_size, [0.0] * world_size)
    start = time.monotonic()
    while time.monotonic() < start + 60 and any(None in job.statuses for job in jobs.values()):
        for job, found in jobs.items():
            for rank, process in enumerate(processes[job]):
                if found.statuses[rank] is None and process.exitcode is not None:
                    found.statuses[rank], found.times[rank] = process.exitcode, time.time()
        time.sleep(0.05)
    for process in itertools.chain(*processes.values()):
        process.kill()
        process.join(30)
    return jobs


def test_a_sleeping_rank_ends_the_run_and_is_named(ended: dict[Callable, Ended]) -> None:
    job = ended[sleeps]
    assert job.statuses == [EXIT_STATUS] * 3, job.log(0)
    for rank in range(3):
        (error,) = [line for line in job.log(rank).splitlines() if "error:" in line]
        assert re.search(r"all ranks wait in step 4 \(training\) for \d+ s: rank 2 in sleeping_for_ever \(", error)
        assert re.search(r"ranks 0, 1 in all_reduce \(distributed_c10d\.py:\d+\); stacks go to ", error)
        assert f"hang-rank-{rank:05d}.txt" in error
        assert ("sleeping_for_ever" in job.stacks(rank)) is (rank == 2)
        assert "in steps_until" in job.stacks(rank)
        written = (job.folder / f"hang-rank-{rank:05d}.txt").stat().st_mtime
        assert min(job.times) - written > 0.7 * watchdog.LINGER_SECONDS, "no rank ends before all have written"
    assert max(job.times) - min(job.times) < SECONDS + watchdog.LINGER_SECONDS


def test_a_rank_whose_lock_is_held_is_named_by_the_other(ended: dict[Callable, Ended]) -> None:
    job = ended[loops]
    assert job.statuses == [EXIT_STATUS, 1], job.log(0)
    assert "rank 1 is silent, and was last heard of in step 4 (training); rank 0 waits in step 4" in job.log(0)
    assert "looping_in_c_for_ever" in job.stacks(1)
    assert "all_reduce" in job.stacks(0)


def test_a_rank_that_is_behind_is_named(ended: dict[Callable, Ended]) -> None:
    job = ended[lags]
    assert job.statuses == [EXIT_STATUS] * 3, job.log(0)
    for rank in range(3):
        assert re.search(r"rank 1 has not gone past step 2 \(training\) for \d+ s: in sleeping_", job.log(rank))
        assert "ranks 0, 2 wait in step 2 (evaluating)" in job.log(rank)


def test_a_rank_that_is_through_is_not_called_silent(ended: dict[Callable, Ended]) -> None:
    job = ended[leaves]
    assert job.statuses[1] == EXIT_STATUS
    assert "rank 0 has left the loop; rank 1 waits in step 3 (training)" in job.log(1)
    assert not (job.folder / "hang-rank-00000.txt").exists()


def test_a_slow_run_that_beats_is_left_alone(ended: dict[Callable, Ended]) -> None:
    job = ended[slow]
    assert job.statuses == [0, 0], job.log(0)
    assert not list(job.folder.glob("hang-*"))
    assert "error" not in job.log(0)


def test_closing_is_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disarmed: list[bool] = []
    monkeypatch.setattr(watchdog.faulthandler, "cancel_dump_traceback_later", lambda: disarmed.append(True))
    with Watchdog(tmp_path, 60, None, 0, 1) as dog:
        dog.beat(1)
        assert [thread.name for thread in threading.enumerate()].count("watchdog") == 1
        start = time.monotonic()
    assert time.monotonic() - start < watchdog.POLL_SECONDS / 2
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]
    assert disarmed
    assert not list(tmp_path.iterdir())


def test_stacks_of_an_earlier_attempt_stay(tmp_path: Path) -> None:
    (tmp_path / "hang-rank-00000.txt").write_text("earlier")
    with Watchdog(tmp_path, 60, None, 0, 1):
        pass
    assert (tmp_path / "hang-rank-00000.txt").read_text() == "earlier"


def test_a_limit_below_what_can_be_watched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"seconds=0\.5 must be at least 1"):
        Watchdog(tmp_path, 0.5, None, 0, 1)


def at(number: int, step: int, place: str = "wait (x.py:1)", phase: str = "training") -> Stand:
    return Stand(number, step, phase, 1800.4, place)


@pytest.mark.parametrize(
    ("answered", "last", "text"),
    [
        (
            {0: at(9, 121), 1: at(9, 121), 2: at(9, 121), 3: at(8, 120, "read (cache.py:50)")},
            {},
            "rank 3 has not gone past step 120 (training) for 1,800 s: in read (cache.py:50); "
            "ranks 0, 1, 2 wait in step 121 (training)",
        ),
        (
            {0: at(9, 121), 1: at(9, 121)},
            {},
            "all ranks wait in step 121 (training) for 1,800 s: in wait (x.py:1)",
        ),
        (  # after a roll-back the smaller step is ahead
            {0: at(9, 121), 1: at(10, 100)},
            {},
            "rank 0 has not gone past step 121 (training) for 1,800 s: in wait (x.py:1); "
            "rank 1 waits in step 100 (training)",
        ),
        (
            {0: at(9, 121), 2: at(9, 121)},
            {1: at(9, 121), 3: None},
            "rank 1 is silent, and was last heard of in step 121 (training); rank 3 is silent; "
            "ranks 0, 2 wait in step 121 (training) for 1,800 s: in wait (x.py:1)",
        ),
        (
            {1: at(9, 120, phase="saving")},
            {0: at(10, 120, phase=LEFT)},
            "rank 0 has left the loop; rank 1 waits in step 120 (saving) for 1,800 s: in wait (x.py:1)",
        ),
    ],
)
def test_what_is_said(answered: dict[int, Stand], last: dict[int, Stand | None], text: str) -> None:
    assert describe(answered, last) == text
