"""A run that is started again when it fails, and given up when that does not help.

start ─► exit record, last step ─► finished, stopped: done
                                   failed further on than before: wait, start again
                                   failed at the same step again, or too often: give up
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megakor.config.schema import EngineConfig, LaunchConfig
from megakor.launch.command import Command
from megakor.launch.layout import largest_world_size
from megakor.logs import get_logger
from megakor.train.exit_record import ExitRecord, read_exit, remove_exit
from megakor.train.metrics import read_metrics
from megakor.train.stop import STOP

log = get_logger(__name__)

LONGEST_PAUSE = 600.0
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class GivenUp(OSError):
    """A run fails, and starting it again does not help."""


@dataclass(frozen=True)
class Failure:
    """How a start of a run ended that did not finish.

    Attributes:
        step: the last step that it logged; None when it did not come so far.
        reason: its own words, or what is known.
    """

    step: int | None
    reason: str

    @property
    def where(self) -> str:
        """How far it had come, in words."""
        return "before its first step" if self.step is None else f"after step {self.step}"


def given_up(failures: Sequence[Failure], restarts: int) -> str | None:
    """Why a run that has failed so often is not started again; None when it is."""
    *earlier, last = failures
    if earlier and earlier[-1].step == last.step:
        return f"failed {last.where} twice, so that no start helps: {last.reason}"
    if len(failures) > restarts:
        return f"failed {last.where} and launch.restarts={restarts} are used up: {last.reason}"
    return None


def last_step(run: Path) -> int | None:
    """The last step on record, of any start."""
    return max((record["step"] for record in read_metrics(run) if record["kind"] == "train"), default=None)


def num_starts(run: Path) -> int:
    """How often a run has got as far as its first step's beginning."""
    return sum(record["kind"] == "start" for record in read_metrics(run))


def how_it_ended(run: Path, status: int, starts: int, world_size: int) -> tuple[ExitRecord | None, Failure | None]:
    """The exit record of a start that finished or was stopped, or how it failed.

    Args:
        status: exit status of the launcher.
        starts: `num_starts` before.
        world_size: ranks.
    """
    record = read_exit(run)
    if record is not None and record.outcome in ("finished", "stopped"):
        return record, None
    if status == 0 and record is None:  # there was nothing left to do
        return ExitRecord("finished", "there was nothing left to do", last_step(run) or 0, None, world_size), None
    began = num_starts(run) > starts
    reason = record.reason if record is not None else f"it was killed, or never began (exit status {status})"
    return None, Failure(last_step(run) if began else None, reason)


class Supervisor:
    """Starts a run, and starts it again.

    Args:
        config: the run.
        command: the launcher's command line for so many ranks.
        slots: how many ranks there is room for now; asked before every start.
        pause: waits so many seconds.
    """

    def __init__(
        self,
        config: EngineConfig,
        command: Callable[[int], Command],
        slots: Callable[[], int],
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.config, self.command, self.slots, self.pause = config, command, slots, pause
        self.settings: LaunchConfig = config.launch
        self.run = Path(config.run)
        self.stopping = False

    def supervise(self) -> ExitRecord:
        """Start the run until it finishes or is stopped; its exit record.

        Raises:
            GivenUp: it failed more than `launch.restarts` times, twice at the same step, or there is no room for it.
        """
        failures: list[Failure] = []
        while True:
            record, failure = self._once()
            if record is not None:
                return record
            assert failure is not None
            failures.append(failure)
            log.error("start %d of run=%s failed %s: %s", len(failures), self.run, failure.where, failure.reason)
            if self.stopping:
                rest = f"failed {failure.where} while it was being stopped: {failure.reason}"
                raise GivenUp(f"run={self.run}: {rest}")
            why = given_up(failures, self.settings.restarts)
            if why is not None:
                raise GivenUp(f"run={self.run}: {why}")
            seconds = min(LONGEST_PAUSE, self.settings.pause_seconds * 2 ** (len(failures) - 1))
            seconds *= random.uniform(0.5, 1)
            log.info("restart %d of %d in %.0f s", len(failures), self.settings.restarts, seconds)
            self.pause(seconds)

    def _once(self) -> tuple[ExitRecord | None, Failure | None]:
        """One start: its exit record if it finished or was stopped, or how it failed."""
        try:
            world_size = self.world_size()
        except ValueError as error:
            raise GivenUp(f"run={self.run}: {error}") from error
        starts = num_starts(self.run)
        remove_exit(self.run)
        command = self.command(world_size)
        log.info("$ %s", command)
        environment = command.full_environment()
        process = subprocess.Popen(command.words, env=environment, start_new_session=True, stdout=sys.stderr)
        with self._stops_on_signals():
            status = process.wait()
        return how_it_ended(self.run, status, starts, world_size)

    def world_size(self) -> int:
        """Ranks to start now; ValueError when there is no room for a replica, or for all where it is not elastic."""
        slots, wanted = self.slots(), self.settings.num_ranks
        if wanted is not None and slots >= wanted:
            return wanted
        size = largest_world_size(self.config.parallel, slots if wanted is None else min(slots, wanted))
        if wanted is not None and not self.settings.elastic:
            raise ValueError(f"launch.num_ranks={wanted} must be at most the {slots} slots that are there")
        if wanted is not None or size < slots:
            missing = "" if wanted is None else f" of launch.num_ranks={wanted}"
            log.warning("going on with %d ranks%s; %d of %d slots are idle", size, missing, slots - size, slots)
        return size

    @contextmanager
    def _stops_on_signals(self) -> Iterator[None]:
        """Asked to end by a signal, ask the run to stop by its file: launchers give ranks too little time to save."""

        def ask(number: int, frame: FrameType | None) -> None:
            self.stopping = True
            (self.run / STOP).touch()
            log.warning("%s: the run saves at its next step boundary and ends", signal.Signals(number).name)

        before = {number: signal.signal(number, ask) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
