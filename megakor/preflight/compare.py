"""What rank 0 makes of who has come: nodes, and a line for each fault that names node and rank, value and rule."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megakor.preflight.addresses import reachable_by_others
from megakor.preflight.identity import Identity

GIB = 2**30
FREE_SHARE = 0.9
"""Of an accelerator's memory before anything is built; a context of its own takes less than the rest."""
SHARED_BYTES = GIB
"""Of /dev/shm, over which NCCL's ranks of a node talk: NVIDIA's documentation gives containers 1 GB of it."""
SHOWN = 4
"""Differences that a line names."""


@dataclass(frozen=True)
class Node:
    """A machine, or a container on it, and its ranks, ascending."""

    label: str
    ranks: list[int]


@dataclass(frozen=True)
class Nodes:
    """The nodes in the order of their first ranks."""

    all: list[Node]

    @classmethod
    def of(cls, people: Mapping[int, Identity]) -> Nodes:
        ranks: dict[str, list[int]] = defaultdict(list)
        for rank in sorted(people):
            ranks[people[rank].machine].append(rank)
        hosts = Counter(people[own[0]].host for own in ranks.values())
        found = []
        for own in ranks.values():
            first = people[own[0]]
            found.append(Node(first.host if hosts[first.host] == 1 else f"{first.host} ({first.address})", own))
        return cls(found)

    def home(self, rank: int) -> Node:
        """The node that a rank is on."""
        return next(node for node in self.all if rank in node.ranks)

    def where(self, ranks: Iterable[int]) -> str:
        """`node a`, or `node b, ranks 3, 5` where not all of its ranks are meant; several joined by `and`."""
        meant = set(ranks)
        if len(self.all) > 2 and meant >= {rank for node in self.all for rank in node.ranks}:
            return "every node"
        words = []
        for node in self.all:
            own = [rank for rank in node.ranks if rank in meant]
            if own:
                words.append(f"node {node.label}" + ("" if own == node.ranks else f", {listed(own)}"))
        return " and ".join(words)


def listed(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 3, 5` or `ranks 0-7, 12`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"


def counted(count: int, what: str) -> str:
    """`no faults`, `1 fault`, `2 faults`."""
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def faults_of(people: Mapping[int, Identity], world_size: int, seconds: float) -> list[str]:
    """Everything that is wrong with who has come.

    Args:
        people: by rank.
        seconds: that were waited.
    """
    nodes = Nodes.of(people)
    faults = missing(people, world_size, seconds)
    faults += [f"{nodes.where([rank])}: {problem}" for rank, one in people.items() for problem in one.problems]
    faults += places(people, nodes, complete=len(people) == world_size)
    faults += addresses(people, nodes)
    for section in ("versions", "packages", "config"):
        faults += differences({rank: getattr(one, section) for rank, one in people.items()}, nodes)
    return faults


def missing(people: Mapping[int, Identity], world_size: int, seconds: float) -> list[str]:
    """Who has not come, and beside whom it would stand where nodes are filled one after the other."""
    absent = [rank for rank in range(world_size) if rank not in people]
    if not absent:
        return []
    size = people[0].local_size
    homes = {one.rank // size: one.host for one in people.values()}
    beside: dict[str, list[int]] = defaultdict(list)
    for rank in absent:
        home = homes.get(rank // size)
        beside[f"on node {home}" if home else f"on the node of rank {rank // size * size}"].append(rank)
    words = "; ".join(f"{listed(ranks)} {home}" for home, ranks in beside.items())
    return [f"{words}: must come to rank 0 within {seconds:.0f} s; {len(people)} of {world_size} ranks have come"]


def places(people: Mapping[int, Identity], nodes: Nodes, complete: bool) -> list[str]:
    """Ranks of a node against each other and against its devices and its memory."""
    faults = []
    for node in nodes.all:
        own = [people[rank] for rank in node.ranks]
        first = own[0]
        for number, count in Counter(one.local_rank for one in own).items():
            if count > 1:
                ranks = [one.rank for one in own if one.local_rank == number]
                faults.append(f"node {node.label}, {listed(ranks)}: LOCAL_RANK={number} must be one rank's alone")
        if complete and first.local_size != len(own):
            faults.append(
                f"node {node.label}: LOCAL_WORLD_SIZE={first.local_size} must be the number of its ranks, {len(own)}"
            )
        devices = first.num_devices
        if devices and len(own) > devices:
            faults.append(f"node {node.label}: {len(own)} ranks must be at most the {devices} devices that they see")
        for one in own:
            here = f"node {node.label}, rank {one.rank}"
            if one.num_devices and one.local_rank >= one.num_devices:
                faults.append(f"{here}: LOCAL_RANK={one.local_rank} must be below its {one.num_devices} devices")
            elif one.num_devices and one.device_free < FREE_SHARE * one.device_total:
                free, total = one.device_free / GIB, one.device_total / GIB
                faults.append(
                    f"{here}: {free:.1f} GiB of {total:.1f} GiB of device memory are free, must be {FREE_SHARE:.0%}: "
                    f"another process holds the rest"
                )
        if devices and len(own) > 1 and first.shared_free < SHARED_BYTES:
            free = first.shared_free / 2**20
            faults.append(f"node {node.label}: /dev/shm must have 1024 MiB free for NCCL, and has {free:.0f} MiB")
    return faults


def addresses(people: Mapping[int, Identity], nodes: Nodes) -> list[str]:
    """Addresses that no other node reaches, where there are other nodes."""
    if len(nodes.all) == 1:
        return []
    faults = []
    for node in nodes.all:
        first = people[node.ranks[0]]
        use = f"cluster.interface (GLOO_SOCKET_IFNAME) must name one of {', '.join(first.usable) or 'none is up'}"
        if first.address and not reachable_by_others(first.address):
            faults.append(
                f"node {node.label}: gloo would take address {first.address}, which no other node reaches, as the host "
                f"name {first.host} means; {use}"
            )
        elif first.library_address and not reachable_by_others(first.library_address):
            faults.append(
                f"node {node.label}: NCCL would take address {first.library_address}, which no other node reaches; "
                f"{use.replace('GLOO', 'NCCL')}"
            )
    return faults


def differences(values: Mapping[int, Mapping[str, Any]], nodes: Nodes) -> list[str]:
    """Where ranks differ in what must be the same: the few from the many, and from rank 0 where they are as many.

    Args:
        values: of each rank by key.
    """
    odd: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for key in sorted({key for own in values.values() for key in own}):
        words = {rank: told(own[key]) if key in own else "absent" for rank, own in sorted(values.items())}
        usual = Counter(words.values()).most_common(1)[0][0]
        for value in dict.fromkeys(words.values()):
            if value != usual:
                ranks = tuple(rank for rank, word in words.items() if word == value)
                odd[ranks].append(f"{key}={value} must be {usual}")
    faults = []
    for ranks, words_of_ranks in odd.items():
        more = f", and {len(words_of_ranks) - SHOWN} more" if len(words_of_ranks) > SHOWN else ""
        faults.append(f"{nodes.where(ranks)}: {', '.join(words_of_ranks[:SHOWN])}{more}, as on the other ranks")
    return faults


def told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
