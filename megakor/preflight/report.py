"""What a preflight found: a report, as rank 0 puts it together."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from megakor.preflight.clock import Offset
from megakor.preflight.compare import Node, Nodes
from megakor.preflight.identity import Identity
from megakor.preflight.judge import links_of
from megakor.preflight.rates import Rates


@dataclass
class NodeReport:
    """A node's row. Bytes, seconds, TFLOP/s, GB/s and µs; None: not measured.

    Attributes:
        device_free: the least of its ranks' devices.
        matmul_tflops: of each rank.
        node_gb_per_s, node_latency_us: all-reduce of its ranks, the slowest rank's.
        network_gb_per_s, network_latency_us: all-reduces of its ranks with those of other nodes, the median.
    """

    label: str
    ranks: list[int]
    address: str
    interface: str
    device: str
    num_devices: int
    device_free: int
    device_total: int
    host_free: int
    shared_free: int
    clock_seconds: float | None = None
    clock_uncertainty: float | None = None
    matmul_tflops: list[float] = field(default_factory=list)
    node_gb_per_s: float | None = None
    node_latency_us: float | None = None
    network_gb_per_s: float | None = None
    network_latency_us: float | None = None


@dataclass
class LinkReport:
    """An all-reduce of two ranks of different nodes."""

    ranks: tuple[int, int]
    gb_per_s: float
    latency_us: float


@dataclass
class Report:
    """What is known of all ranks; on ranks other than 0 the faults alone.

    Attributes:
        configuration: fingerprint.
        packages: how many are installed.
        inputs: fingerprint of each.
        disk_free, checkpoint_bytes: of the run folder, and of one checkpoint.
        rounds: of pairs of nodes: measured, and in all.
        seconds: that each part took.
        faults: a line each.
    """

    world_size: int
    versions: dict[str, str] = field(default_factory=dict)
    packages: int = 0
    configuration: str = ""
    nodes: list[NodeReport] = field(default_factory=list)
    links: list[LinkReport] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    run: str = ""
    disk_free: int | None = None
    checkpoint_bytes: int | None = None
    rounds: tuple[int, int] = (0, 0)
    seconds: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def add_people(self, people: Mapping[int, Identity], nodes: Nodes) -> None:
        """Who has come."""
        first = people[0]
        self.versions, self.packages, self.configuration = first.versions, len(first.packages), first.fingerprint()
        self.nodes = [node_report(node, people) for node in nodes.all]

    def add_clocks(self, offsets: Mapping[int, Offset]) -> None:
        for node in self.nodes:
            if node.ranks[0] in offsets:
                offset = offsets[node.ranks[0]]
                node.clock_seconds, node.clock_uncertainty = offset.seconds, offset.uncertainty

    def add_rates(self, rates: Mapping[int, Rates]) -> None:
        """What ranks have measured."""
        links = links_of(rates)
        self.links = [LinkReport(pair, link.gb_per_s, link.latency_us) for pair, link in sorted(links.items())]
        size = len(self.nodes)
        self.rounds = (max((own.rounds for own in rates.values()), default=0), size - 1 + size % 2 if size > 1 else 0)
        for node in self.nodes:
            own = [rates[rank] for rank in node.ranks if rank in rates]
            node.matmul_tflops = [one.matmul_tflops for one in own if one.matmul_tflops is not None]
            if inside := [one.node for one in own if one.node]:
                node.node_gb_per_s = min(link.gb_per_s for link in inside)
                node.node_latency_us = max(link.latency_us for link in inside)
            if outside := [link for pair, link in links.items() if set(pair) & set(node.ranks)]:
                node.network_gb_per_s = statistics.median(link.gb_per_s for link in outside)
                node.network_latency_us = statistics.median(link.latency_us for link in outside)


def node_report(node: Node, people: Mapping[int, Identity]) -> NodeReport:
    """A node's row, without what is measured later."""
    own = [people[rank] for rank in node.ranks]
    first, fullest = own[0], min(own, key=lambda one: one.device_free)
    return NodeReport(
        node.label, node.ranks, first.address, first.interface, first.device, first.num_devices, fullest.device_free,
        first.device_total, first.host_free, first.shared_free,
    )  # fmt: skip
