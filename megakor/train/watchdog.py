"""A hang's end: when a rank's steps stop, every rank writes where it stands, says who is behind, and ends.

A rank that hangs takes all others with it, silently: they wait for it in a collective until the backend's timeout, and
none can say for whom. So every rank has a thread that tells the process group's store where the rank is.

    beat ─► this rank's thread ─► store ─► … one rank's beat is too old ─► all answer where they stand ─► stacks, exit

The thread runs also while the main thread waits in a collective, which releases the interpreter's lock. A rank whose
lock is held, such as in an endless loop in C, cannot answer: the others name it as silent, by the last that it had
told, and `faulthandler`, which needs no lock, writes its stack and ends it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from megakor.logs import get_logger

log = get_logger(__name__)

EXIT_STATUS = os.EX_TEMPFAIL
"""75: the same command may do better the next time."""

FIRST_SECONDS = 1800.0
"""The first step, which may compile and makes the connections, has at least so long."""

POLL_SECONDS = 0.5
ANSWER_SECONDS = 2.0  # for the others to answer; more than a poll
LINGER_SECONDS = 2.0  # for the others to write, before the store or the launcher's patience goes with this process
FALLBACK_SECONDS = POLL_SECONDS + ANSWER_SECONDS + 0.75  # when the others have spoken, before they end

LEFT = "left the loop"


@dataclass(frozen=True)
class Stand:
    """Where a rank is.

    Attributes:
        number: its beats so far; ranks beat in the same order, so the smallest is furthest behind.
        step: of its last beat.
        phase: of its last beat.
        seconds: since its last beat.
        place: the innermost function of its training thread, with file and line; empty where unknown.
    """

    number: int
    step: int
    phase: str
    seconds: float = 0.0
    place: str = ""

    def __str__(self) -> str:
        return self.phase if self.phase == LEFT else f"step {self.step} ({self.phase})"


def describe(answered: Mapping[int, Stand], last: Mapping[int, Stand | None]) -> str:
    """What a hang looks like, in a sentence that begins with whom to look at.

    Args:
        answered: where the ranks that answer stand.
        last: what silent ranks had told last; None: nothing.
    """
    parts = []
    for rank, stand in sorted(last.items()):
        if stand is None:
            parts.append(f"rank {rank} is silent")
        elif stand.phase == LEFT:
            parts.append(f"rank {rank} has left the loop")
        else:
            parts.append(f"rank {rank} is silent, and was last heard of in {stand}")
    if answered:
        behind = min(stand.number for stand in answered.values())
        slow = {rank: stand for rank, stand in answered.items() if stand.number == behind}
        ahead = {rank: stand for rank, stand in answered.items() if stand.number > behind}
        first = next(iter(slow.values()))
        seconds = f"{max(stand.seconds for stand in slow.values()):,.0f} s"
        if ahead:
            have = "has" if len(slow) == 1 else "have"
            parts.append(f"{listed(slow)} {have} not gone past {first} for {seconds}: {places(slow)}")
            parts.append(f"{listed(ahead)} {waits(ahead)} in {', '.join(sorted({str(s) for s in ahead.values()}))}")
        else:
            whole = "all ranks wait" if not last and len(slow) > 1 else f"{listed(slow)} {waits(slow)}"
            parts.append(f"{whole} in {first} for {seconds}: {places(slow)}")
    return "; ".join(parts)


def listed(ranks: Mapping[int, object]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(str(rank) for rank in sorted(ranks))


def waits(ranks: Mapping[int, object]) -> str:
    return "waits" if len(ranks) == 1 else "wait"


def places(stands: Mapping[int, Stand]) -> str:
    """The functions that ranks are in; with the ranks where they differ, the place of the fewest first."""
    by_place: dict[str, dict[int, Stand]] = {}
    for rank, stand in stands.items():
        by_place.setdefault(stand.place, {})[rank] = stand
    if len(by_place) == 1:
        return f"in {next(iter(by_place))}"
    groups = sorted(by_place.items(), key=lambda group: (len(group[1]), min(group[1])))
    return ", ".join(f"{listed(ranks)} in {place}" for place, ranks in groups)


def place_of(thread: int) -> str:
    """The innermost function of a thread."""
    frame: FrameType | None = sys._current_frames().get(thread)
    if frame is None:
        return "no thread"
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


class Watchdog:
    """Watches this rank's beats and ends the process when they stop; a context manager around the step loop.

    Every rank makes one and beats at the same places. When the last beat of any rank is older than `seconds`, all ranks
    within a few seconds write the Python stacks of all their threads to `hang-rank-00003.txt` (appended, so that an
    automatic restart keeps them), log one error that names the ranks to look at, and end with status 75. A rank that
    cannot run Python writes its stack alone and ends with status 1.

    The limit counts from the first beat on; before, the process group's own timeout watches. Between the first beat and
    the second it is at least `FIRST_SECONDS`. Work that takes longer than the limit between two beats, such as saving a
    large model to a slow disk, is taken for a hang. A limit near the process group's timeout (30 minutes) or above lets
    that end the ranks first, unnamed.

    Args:
        folder: where stacks are written; it is there already.
        seconds: limit between two beats.
        store: makes a client of the process group's store, for the thread alone: `connect_store`. None: this rank
            watches only itself, as in a group of one.
        rank: this rank.
        world_size: ranks that share the store.

    Raises:
        ValueError: a limit of less than two polls.
    """

    def __init__(
        self, folder: Path, seconds: float, store: Callable[[], dist.Store] | None, rank: int, world_size: int
    ) -> None:
        if seconds < 2 * POLL_SECONDS:
            raise ValueError(f"seconds={seconds} must be at least {2 * POLL_SECONDS}")
        self.seconds, self.rank, self.world_size = seconds, rank, world_size
        self.path = folder / f"hang-rank-{rank:05d}.txt"
        self.connect = store if world_size > 1 else None
        # torchrun may keep a store over its restarts; what an attempt left there is not this one's.
        self.prefix = f"megakor/watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self.last: tuple[int, int, str, float] | None = None
        self.over = threading.Event()

    def __enter__(self) -> Watchdog:
        self.trainer = threading.get_ident()
        self.store = self.connect() if self.connect is not None else None
        self.stacks = self.path.open("a", encoding="utf-8")  # open from now on: faulthandler can open none by itself
        self.thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """End the thread; a file without stacks goes."""
        self.over.set()
        self.thread.join(10.0)
        faulthandler.cancel_dump_traceback_later()
        self.stacks.close()
        if self.path.stat().st_size == 0:
            self.path.unlink()

    def beat(self, step: int, phase: str = "training") -> None:
        """Say that this rank begins a phase of a step; costs nothing that one could measure.

        Every rank calls, at the same places: at the start of each step, and where longer work than a step begins, such
        as `saving` or `evaluating`.
        """
        number = 1 if self.last is None else self.last[0] + 1
        self.last = (number, step, phase, time.monotonic())

    def _limit(self, number: int) -> float:
        return max(self.seconds, FIRST_SECONDS) if number == 1 else self.seconds

    def _watch(self) -> None:
        told = 0
        while not self.over.wait(POLL_SECONDS):
            last = self.last
            if last is None:
                continue
            number, step, phase, since = last
            overdue = time.monotonic() - since - self._limit(number)
            if number != told:
                # Armed by time of the beat, not of the poll: it must go off before the other ranks end.
                left = max(POLL_SECONDS, FALLBACK_SECONDS - overdue)
                faulthandler.dump_traceback_later(left, file=self.stacks, exit=True)
                told = number
                self._tell(Stand(number, step, phase))
            if overdue > 0 or self._called():
                return self._end(Stand(number, step, phase, time.monotonic() - since, place_of(self.trainer)))
        if self.last is not None:
            self._tell(Stand(self.last[0] + 1, self.last[1], LEFT))

    def _tell(self, stand: Stand) -> None:
        if self.store is not None:
            try:
                self.store.set(f"{self.prefix}/{self.rank}", json.dumps(asdict(stand)))
            except RuntimeError:
                self.store = None  # it has gone, and with it the process that kept it; this rank still watches itself

    def _called(self) -> bool:
        """Whether some rank has found a hang."""
        if self.store is None:
            return False
        try:
            return self.store.check([f"{self.prefix}/stands"])
        except RuntimeError:
            self.store = None
            return False

    def _end(self, stand: Stand) -> None:
        """Answer, say who is behind, write the stacks, and end the process."""
        faulthandler.cancel_dump_traceback_later()
        # Ends the process also where this thread gets stuck itself: on a full pipe, or on the disk that all wait for.
        end = threading.Timer(ANSWER_SECONDS + 3 * LINGER_SECONDS, os._exit, (EXIT_STATUS,))
        end.daemon = True
        end.start()
        try:
            answered, last = {self.rank: stand}, dict[int, Stand | None]()
            try:
                answered |= self._gather(stand)
                last = {rank: self._last_of(rank) for rank in range(self.world_size) if rank not in answered}
            except RuntimeError as error:
                log.warning("the process group's store has gone: %s", str(error).splitlines()[0])
            log.error("%s; stacks go to %s and its like", describe(answered, last), self.path)
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            self.stacks.write(f"{when} rank {self.rank} in {stand} for {stand.seconds:,.0f} s, {stand.place}\n")
            self.stacks.flush()
            faulthandler.dump_traceback(self.stacks, all_threads=True)
            self.stacks.write("\n")
            self.stacks.flush()
            time.sleep(LINGER_SECONDS)
        finally:
            os._exit(EXIT_STATUS)

    def _gather(self, stand: Stand) -> dict[int, Stand]:
        """Answer where this rank stands; returns where those stand that answer in time."""
        if self.store is None:
            return {}
        key = f"{self.prefix}/stands"
        self.store.append(key, json.dumps([self.rank, asdict(stand)]) + "\n")  # type: ignore[attr-defined]
        found: dict[int, Stand] = {}
        deadline = time.monotonic() + ANSWER_SECONDS
        while len(found) < self.world_size and time.monotonic() < deadline:
            lines = self.store.get(key).decode().splitlines()
            found = {rank: Stand(**told) for rank, told in map(json.loads, lines)}
            time.sleep(POLL_SECONDS / 10)
        return found

    def _last_of(self, rank: int) -> Stand | None:
        """What a rank that does not answer had told last."""
        key = f"{self.prefix}/{rank}"
        if self.store is None or not self.store.check([key]):
            return None
        return Stand(**json.loads(self.store.get(key)))
