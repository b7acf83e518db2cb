"""Whose clock is off, and by how much: rank 0 asks the first rank of every other node for its time, one by one.

Offset = their time - the middle of asking and hearing, which is off by half of that time at most (Cristian 1989). Of
`ASKED` times the shortest counts. Six messages each: 558 for 32 nodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megakor.preflight.meeting import Meeting

ASKED = 3
CLOSE_SECONDS = 1.0
"""Apart at most: logs of several nodes are read side by side, and modification times compared."""


@dataclass(frozen=True)
class Offset:
    """Seconds that a clock is ahead of rank 0's, and how uncertain that is."""

    seconds: float
    uncertainty: float

    @property
    def close(self) -> bool:
        return abs(self.seconds) - self.uncertainty <= CLOSE_SECONDS


def compare_clocks(meeting: Meeting, leaders: Sequence[int], now: Callable[[], float] = time.time) -> dict[int, Offset]:
    """Offsets by rank, on rank 0; elsewhere empty. Rank 0 and every leader call.

    Args:
        leaders: one rank of each node, rank 0 among them.
        now: this machine's clock, in seconds since 1970.
    """
    found: dict[int, Offset] = {}
    if meeting.rank:
        for number in range(ASKED):
            meeting.hear(f"clock/asked/{meeting.rank}/{number}", 0)
            meeting.store.set(f"clock/told/{meeting.rank}/{number}", repr(now()))
        return found
    for rank in leaders[1:]:
        for number in range(ASKED):
            asked = now()
            meeting.store.set(f"clock/asked/{rank}/{number}", "0")
            theirs = float(meeting.hear(f"clock/told/{rank}/{number}", rank))
            heard = now()
            offset = Offset(theirs - (asked + heard) / 2, (heard - asked) / 2)
            if rank not in found or offset.uncertainty < found[rank].uncertainty:
                found[rank] = offset
    return {leaders[0]: Offset(0.0, 0.0), **found}
