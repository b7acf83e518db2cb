"""How fast devices and links are: matmuls of every rank, all-reduces within every node and between nodes.

Between nodes, the ranks of equal local rank form pairs, so all of a node's network cards work at once. Rounds of
disjoint pairs, as in a tournament, take one after the other: for n nodes n - 1 rounds (n, where n is odd) measure every
pair of nodes. They end early after `LINK_SECONDS`; the rounds done have then still measured every node as often.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megakor.config.schema import Precision
from megakor.preflight.compare import Node
from megakor.preflight.meeting import Meeting
from megakor.train.device import device, is_cpu, matmul_tflops, wait_for_device

MATMUL_SECONDS = 1.0
LINK_SECONDS = 15.0
PAIR_SECONDS = 0.2
"""Time of a link's measured all-reduces."""
HOST_BYTES, ACCELERATOR_BYTES = 16 * 2**20, 256 * 2**20
"""What is reduced: large enough that its time is bandwidth."""
SMALL = 20
"""All-reduces of one number, of which the median is the latency."""
GROUP_SECONDS = 20.0


@dataclass(frozen=True)
class Link:
    """An all-reduce over a link.

    Attributes:
        gb_per_s: bus bandwidth, 2 (n - 1) / n · bytes / seconds for n ranks, as NVIDIA's nccl-tests define it.
        latency_us: of an all-reduce of one number.
    """

    gb_per_s: float
    latency_us: float


@dataclass
class Rates:
    """What a rank has measured.

    Attributes:
        matmul_tflops: of its device; None: it failed.
        node: within its node; None where it is alone there.
        links: to the rank of each other node that it was paired with.
        rounds: of pairs that were measured.
        errors: what failed.
    """

    matmul_tflops: float | None = None
    node: Link | None = None
    links: dict[int, Link] = field(default_factory=dict)
    rounds: int = 0
    errors: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Rates:
        node = Link(**raw["node"]) if raw["node"] else None
        links = {int(rank): Link(**link) for rank, link in raw["links"].items()}
        return cls(raw["matmul_tflops"], node, links, raw["rounds"], raw["errors"])


def measure(
    meeting: Meeting,
    nodes: Sequence[Node],
    precision: Precision,
    matmul: Callable[[Precision, float], float] = matmul_tflops,
) -> Rates:
    """This rank's rates; every rank calls.

    Args:
        matmul: measures this rank's device for so many seconds, TFLOP/s.
    """
    rates = Rates()
    dist.barrier()
    try:
        rates.matmul_tflops = matmul(precision, MATMUL_SECONDS)
    except RuntimeError as error:  # out of memory, or a device that fails
        rates.errors.append(f"matmul: {first_line(error)}")
    dist.barrier()
    home = next(number for number, node in enumerate(nodes) if meeting.rank in node.ranks)
    if len(nodes[home].ranks) > 1:
        rates.node = measured("within the node", nodes[home].ranks, rates.errors)
    dist.barrier()
    place = nodes[home].ranks.index(meeting.rank)
    deadline = time.monotonic() + LINK_SECONDS
    for number, opponents in enumerate(rounds(len(nodes))):
        if not meeting.answer(f"round/{number}", time.monotonic() < deadline):
            break
        rates.rounds += 1
        other = opponents[home]
        if other is not None and place < len(nodes[other].ranks):
            partner = nodes[other].ranks[place]
            link = measured(f"to rank {partner}", sorted((meeting.rank, partner)), rates.errors)
            if link is not None:
                rates.links[partner] = link
    return rates


def rounds(num_nodes: int) -> Iterator[list[int | None]]:
    """Rounds in which every node meets every other one once; each gives a node's opponent, None where it rests.

    The circle method of round-robin tournaments: one stays, the others move on by a place.
    """
    size = num_nodes + num_nodes % 2
    for turn in range(size - 1 if num_nodes > 1 else 0):
        order = [0, *((turn + number) % (size - 1) + 1 for number in range(size - 1))]
        opponents: list[int | None] = [None] * num_nodes
        for first, second in zip(order[: size // 2], reversed(order[size // 2 :]), strict=True):
            if max(first, second) < num_nodes:
                opponents[first], opponents[second] = second, first
        yield opponents


def measured(what: str, ranks: Sequence[int], errors: list[str]) -> Link | None:
    """The link that some ranks are on; all of them call. What fails is added to the errors, and the link is None."""
    try:
        with group_of(ranks) as group:
            return measure_link(group, len(ranks))
    except RuntimeError as error:
        errors.append(f"all-reduce {what}: {first_line(error)}")
        return None


@contextmanager
def group_of(ranks: Sequence[int]) -> Iterator[dist.ProcessGroup]:
    """A group of its own, which is gone afterwards; its ranks alone call."""
    group = dist.new_group(list(ranks), timeout=timedelta(seconds=GROUP_SECONDS), use_local_synchronization=True)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def measure_link(group: dist.ProcessGroup, size: int) -> Link:
    """Bandwidth and latency of an all-reduce in a group of so many ranks; each calls."""
    content = torch.zeros((HOST_BYTES if is_cpu() else ACCELERATOR_BYTES) // 4, device=device())
    one = torch.zeros(1, device=device())
    seconds_of(one, group)  # the group connects
    first = torch.tensor([seconds_of(content, group)], device=device())
    dist.all_reduce(first, dist.ReduceOp.MAX, group=group)
    count = min(20, max(1, int(PAIR_SECONDS / first.item())))  # the same on all of them
    best = min(seconds_of(content, group) for _ in range(count))
    latency = sorted(seconds_of(one, group) for _ in range(SMALL))[SMALL // 2]
    share = 2 * (size - 1) / size
    return Link(share * content.numel() * content.element_size() / best / 1e9, latency * 1e6)


def seconds_of(tensor: torch.Tensor, group: dist.ProcessGroup) -> float:
    """Time of an all-reduce."""
    wait_for_device()
    start = time.perf_counter()
    dist.all_reduce(tensor, group=group)
    wait_for_device()
    return time.perf_counter() - start


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
