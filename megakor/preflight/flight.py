"""A preflight: what can be wrong with machines is found before the model is built, and named.

    meet:     store ─► who are you? ─► differences ─► addresses ─► clocks          without a process group
    measure:  inputs, run folder ─► matmuls ─► all-reduces within and between nodes        with one

Both halves end on all ranks together: with nothing, or with `Faulty`, which has a line for each fault.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megakor.config.schema import EngineConfig, PreflightConfig
from megakor.logs import get_logger
from megakor.preflight.addresses import Interfaces, unreachable
from megakor.preflight.clock import CLOSE_SECONDS, Offset, compare_clocks
from megakor.preflight.compare import GIB, Node, Nodes, counted, differences, faults_of
from megakor.preflight.hardware import Probe
from megakor.preflight.identity import Identity, identify
from megakor.preflight.judge import slow
from megakor.preflight.meeting import Meeting
from megakor.preflight.rates import LINK_SECONDS, Rates, measure
from megakor.preflight.report import Report
from megakor.preflight.storage import (
    ANSWERED_SECONDS,
    check_shared,
    checkpoint_bytes,
    free_disk,
    read_inputs,
)

log = get_logger(__name__)

REACH_SECONDS = 3.0
MEASURED_SECONDS = 2 * LINK_SECONDS + 30


class Faulty(ValueError):
    """The machines are not fit for the run; the message has a line for each fault."""


class Preflight:
    """One rank's preflight; every rank makes one and calls `meet`, `measure` and `part`.

    Args:
        config: the run.
        wait_seconds: how long ranks wait for each other at the start.
        slow_below: share of the median of the others below which a device or a link is a fault.
        probe: measures more of this rank's device, for `probes`; None: nothing.

    Attributes:
        report: what has been found so far, on rank 0; the faults on every rank.
        probes: of every rank, on rank 0.
    """

    def __init__(
        self,
        config: EngineConfig,
        wait_seconds: float = PreflightConfig.wait_seconds,
        slow_below: float = PreflightConfig.slow_below,
        probe: Callable[[], Probe] | None = None,
    ) -> None:
        self.config, self.wait_seconds, self.slow_below, self.probe = config, wait_seconds, slow_below, probe
        self.meeting = Meeting.open(wait_seconds)
        self.rank = self.meeting.rank
        self.report = Report(self.meeting.world_size, run=config.run)
        self.nodes = Nodes([])
        self.there: list[int] = []
        self.probes: list[Probe] = []

    def meet(self) -> None:
        """Compare who has come; before the process group starts.

        Raises:
            Faulty: on every rank that has come.
            OSError: rank 0 has gone.
        """
        with self._timed("meeting"):
            own, listener = identify(self.config, self.rank, Interfaces.of_this_machine())
            come = self.meeting.gather("identity", own.as_json(), self.wait_seconds)
            found = self._who(come) if self.rank == 0 else None
            told = self.meeting.answer("people", found, self.wait_seconds + ANSWERED_SECONDS)
            self.nodes, self.there = Nodes([Node(**node) for node in told["nodes"]]), told["there"]
        self._settle(told["faults"])
        with self._timed("addresses"):
            others = {label: (address, port) for label, address, port in told["places"] if label != self.home.label}
            failures = unreachable(others, REACH_SECONDS) if self.leads else {}
            tried = self.meeting.gather("reached", failures, ANSWERED_SECONDS)
            self.meeting.answer("all tried")
            if listener is not None:
                listener.close()
        with self._timed("clocks"):
            offsets = compare_clocks(self.meeting, self.leaders) if self.leads else {}
            self.report.add_clocks(offsets)
            faults = self.meeting.answer("met", self._unreached(tried) + self._off(offsets))
        self._settle(faults)

    def measure(self) -> None:
        """Look into storage and measure; within the process group.

        Raises:
            Faulty: on every rank.
        """
        with self._timed("storage"):
            told = self.meeting.gather("inputs", read_inputs(self.config) if self.leads else {}, ANSWERED_SECONDS)
            wrong = check_shared(self.meeting, Path(self.config.run), self.leaders) if self.leads else {}
            found = self._stored(told, wrong) if self.rank == 0 else []
            faults = self.meeting.answer("stored", found)
        self._settle(faults)
        with self._timed("rates"):
            own = {"rates": measure(self.meeting, self.nodes.all, self.config.train.precision).as_json()}
            if self.probe is not None:
                own["probe"] = asdict(self.probe())
            measured = self.meeting.gather("rates", own, MEASURED_SECONDS)
            found = self._measured(measured) if self.rank == 0 else []
            faults = self.meeting.answer("measured", found, MEASURED_SECONDS)
        self._settle(faults)

    def part(self) -> None:
        """End together; every rank calls, rank 0 when it has shown the report: a launcher ends all after the first."""
        self.meeting.part(self.there)

    @property
    def leaders(self) -> list[int]:
        """The first rank of every node."""
        return [node.ranks[0] for node in self.nodes.all]

    @property
    def leads(self) -> bool:
        return self.rank in self.leaders

    @property
    def home(self) -> Node:
        """This rank's node."""
        return next(node for node in self.nodes.all if self.rank in node.ranks)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.report.seconds[part] = time.monotonic() - start

    def _settle(self, faults: list[str]) -> None:
        self.report.faults = faults
        if faults:
            raise Faulty("\n".join(faults))

    # ------------------------------------------------------------------------------------------------ rank 0's part

    def _who(self, come: Mapping[int, Any]) -> dict[str, Any]:
        """Nodes, faults, and where nodes listen, of who has come."""
        people = {rank: Identity(**one) for rank, one in come.items()}
        nodes = Nodes.of(people)
        self.report.add_people(people, nodes)
        first = [people[node.ranks[0]] for node in nodes.all]
        places = zip((node.label for node in nodes.all), first, strict=True)
        return {
            "nodes": [asdict(node) for node in nodes.all],
            "there": sorted(people),
            "places": [(label, one.library_address, one.port) for label, one in places if one.port],
            "faults": faults_of(people, self.meeting.world_size, self.wait_seconds),
        }

    def _unreached(self, tried: Mapping[int, Mapping[str, str]]) -> list[str]:
        """Nodes that another one cannot connect to: each once, with the first that could not."""
        faults: dict[str, str] = {}
        for rank in sorted(tried):
            for label, why in tried[rank].items():
                here = self.nodes.home(rank).label
                faults.setdefault(label, f"node {label}: node {here} must reach it, and cannot: {why}")
        return list(faults.values())

    def _off(self, offsets: Mapping[int, Offset]) -> list[str]:
        """Nodes whose clocks are not close to rank 0's."""
        return [
            f"node {self.nodes.home(rank).label}: its clock, {offset.seconds:+.3f} ± {offset.uncertainty:.3f} s from "
            f"rank 0's, must be within {CLOSE_SECONDS:g} s"
            for rank, offset in offsets.items()
            if not offset.close
        ]

    def _stored(self, told: Mapping[int, Mapping[str, Any]], wrong: Mapping[int, str]) -> list[str]:
        """What is wrong with inputs and run folder."""
        faults, read = [], {rank: told[rank] for rank in self.leaders if rank in told}
        errors: dict[str, list[int]] = defaultdict(list)
        for rank in self.leaders:
            late = {"inputs": f"must be read within {ANSWERED_SECONDS:.0f} s"}
            for key, error in (read[rank]["errors"] if rank in read else late).items():
                errors[f"{key}: {error}"] += self.nodes.home(rank).ranks
        for rank, error in wrong.items():
            errors[f"run={self.config.run} {error}"] += self.nodes.home(rank).ranks
        faults = [f"{self.nodes.where(ranks)}: {error}" for error, ranks in errors.items()]
        fingerprints = {
            other: one["fingerprints"] for rank, one in read.items() for other in self.nodes.home(rank).ranks
        }
        faults += differences(fingerprints, self.nodes) if not errors else []
        self.report.inputs = read[0]["fingerprints"] if 0 in read else {}
        self.report.disk_free = free_disk(Path(self.config.run))
        if not errors:
            self.report.checkpoint_bytes = size = checkpoint_bytes(self.config)
            if size > self.report.disk_free:
                free = f"{self.report.disk_free / GIB:.3g} GiB"
                faults.append(f"run={self.config.run} must have {size / GIB:.3g} GiB free for a checkpoint, has {free}")
            faults += self._short_of_memory(size) if self.config.checkpoint.asynchronous else []
        return faults

    def _short_of_memory(self, size: int) -> list[str]:
        """Nodes whose hosts cannot hold their ranks' copies of a checkpoint of so many bytes."""
        faults = []
        for node in self.report.nodes:
            copy = size * len(node.ranks) / self.report.world_size
            if copy > node.host_free:
                faults.append(
                    f"node {node.label}: {node.host_free / GIB:.3g} GiB of host memory are free, must hold its part of "
                    f"a checkpoint while it is written, {copy / GIB:.3g} GiB (checkpoint.asynchronous)"
                )
        return faults

    def _measured(self, measured: Mapping[int, Mapping[str, Any]]) -> list[str]:
        """What failed, and what is slow."""
        rates = {rank: Rates.from_json(one["rates"]) for rank, one in measured.items()}
        self.report.add_rates(rates)
        self.probes = [Probe(**one["probe"]) for one in measured.values() if self.probe is not None]
        silent = [rank for rank in self.there if rank not in rates]
        late = [f"{self.nodes.where(silent)}: must have measured within {MEASURED_SECONDS:.0f} s"] if silent else []
        errors = [f"{self.nodes.where([rank])}: {error}" for rank, own in rates.items() for error in own.errors]
        return late + errors + slow(rates, self.nodes, self.slow_below)


def preflight(config: EngineConfig) -> Callable[[], None]:
    """A training verb's preflight, where `launch.preflight` asks for one; every rank calls, before the process group.

    Returns:
        What to call within the process group, before anything is built.

    Raises:
        Faulty, OSError: on all ranks.
    """
    if not config.launch.preflight:
        return lambda: None
    flight = Preflight(config)

    def together(half: Callable[[], None]) -> None:
        try:
            half()
        except Faulty:
            flight.part()
            raise

    def measure() -> None:
        together(flight.measure)
        where = f"{counted(len(flight.there), 'rank')} on {counted(len(flight.nodes.all), 'node')}"
        log.info("preflight: %s, no faults, %.1f s", where, sum(flight.report.seconds.values()))

    together(flight.meet)
    return measure
