"""Meetings over a real store; as many ranks as a cluster has are threads of this process, each with a connection."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megakor.preflight import meeting as meetings
from megakor.preflight.clock import compare_clocks
from megakor.preflight.meeting import Meeting
from tests.ranks import free_port

NUM_RANKS, NUM_NODES = 64, 8


def seats(count: int) -> list[Meeting]:
    """As many seats at one store."""
    port, timeout = free_port(), timedelta(seconds=30)

    def seat(rank: int) -> Meeting:
        store = dist.TCPStore("127.0.0.1", port, None, rank == 0, timeout, wait_for_workers=False)
        return Meeting(store, rank, count)

    return [seat(rank) for rank in range(count)]


def at_once(work: Callable[[Meeting], object], present: list[Meeting]) -> list:
    with ThreadPoolExecutor(len(present)) as threads:
        return list(threads.map(work, present))


def test_64_ranks_meet_in_seconds() -> None:
    """Every message of a preflight of 8 nodes but those of the process group, with 15 kB of each rank."""
    identity = {f"package-{number}": "1.2.3+local" for number in range(500)}
    leaders = list(range(0, NUM_RANKS, NUM_RANKS // NUM_NODES))

    def meet(one: Meeting) -> int:
        told = one.gather("identity", identity, 20)
        one.answer("people", identity)
        if one.rank in leaders:
            offsets = compare_clocks(one, leaders)
            assert one.rank or all(abs(offset.seconds) <= offset.uncertainty for offset in offsets.values())
            assert one.rank or sorted(offsets) == leaders
        for number in range(NUM_NODES - 1):
            one.answer(f"round/{number}", True)
        one.part(range(NUM_RANKS))
        return len(told)

    all_seats = seats(NUM_RANKS)
    start = time.monotonic()
    told = at_once(meet, all_seats)
    assert time.monotonic() - start < 20
    assert told == [NUM_RANKS] + [0] * (NUM_RANKS - 1)


def test_who_does_not_tell_is_left_out() -> None:
    first, second, _ = seats(3)
    second.gather("topic", "two", 5)
    start = time.monotonic()
    assert first.gather("topic", "one", 0.3) == {0: "one", 1: "two"}
    assert 0.3 <= time.monotonic() - start < 5
    assert first.gather("again", 1, 5, ranks=[0]) == {0: 1}


def test_without_an_answer_rank_0_is_named() -> None:
    _, second = seats(2)
    with pytest.raises(OSError, match=r"preflight: rank 0 must tell people within 0 s"):
        second.answer("people", seconds=0.2)


def test_a_restart_by_torchrun_does_not_hear_the_first_try(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    Meeting(store, 1, 2).gather("identity", "of before", 1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Meeting(store, 0, 2).gather("identity", "now", 0.1) == {0: "now"}


def test_rank_0_ends_last() -> None:
    ended: list[int] = []

    def part(one: Meeting) -> None:
        if one.rank == 0:
            time.sleep(0.5)  # it shows the report
        one.part([0, 1, 2])
        ended.append(one.rank)

    at_once(part, seats(3))
    assert ended[-1] == 0


def test_rank_0_does_not_wait_for_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meetings, "PART_SECONDS", 0.2)
    start = time.monotonic()
    seats(2)[0].part([0, 1])
    assert time.monotonic() - start < 5
