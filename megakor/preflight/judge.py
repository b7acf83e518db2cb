"""What is slow: rates far below the median of the others, which one slow part does not move.

A rank with several partners is judged by its best link: that of a healthy one is fast, whoever else is slow. Where both
ends have no other link, the link itself is named.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Hashable, Mapping
from typing import TypeVar

from megakor.preflight.compare import Nodes, listed
from megakor.preflight.rates import Link, Rates

Key = TypeVar("Key", bound=Hashable)
Pair = tuple[int, int]


def below(rates: Mapping[Key, float], share: float) -> dict[Key, float]:
    """Those below a share of the median of all others, and that median."""
    found = {}
    for key, rate in rates.items():
        others = [other for name, other in rates.items() if name != key]
        if others and rate < share * (median := statistics.median(others)):
            found[key] = median
    return found


def links_of(rates: Mapping[int, Rates]) -> dict[Pair, Link]:
    """Links between nodes by the ranks at their ends, the lower one first; of what both ends measured the slower."""
    found: dict[Pair, Link] = {}
    for rank, own in rates.items():
        for partner, link in own.links.items():
            pair = (min(rank, partner), max(rank, partner))
            found[pair] = min(found.get(pair, link), link, key=lambda one: one.gb_per_s)
    return found


def slow(rates: Mapping[int, Rates], nodes: Nodes, share: float) -> list[str]:
    """A line for each node with slow devices or links, and for each slow link between others."""
    return slow_devices(rates, nodes, share) + slow_nodes(rates, nodes, share) + slow_links(rates, nodes, share)


def slow_devices(rates: Mapping[int, Rates], nodes: Nodes, share: float) -> list[str]:
    """Ranks whose matmuls are slow, those of a node in one line."""
    matmuls = {rank: own.matmul_tflops for rank, own in rates.items() if own.matmul_tflops is not None}
    found = below(matmuls, share)
    return [
        f"{nodes.where(ranks)}: matmul at {min(matmuls[rank] for rank in ranks):.3g} TFLOP/s must be at least "
        f"{share:.0%} of the other ranks' median, {found[ranks[0]]:.3g}"
        for ranks in by_node(found, nodes)
    ]


def slow_nodes(rates: Mapping[int, Rates], nodes: Nodes, share: float) -> list[str]:
    """Nodes within which all-reduces are slow."""
    inside: dict[int, float] = {}
    for node in nodes.all:
        own = [link.gb_per_s for rank in node.ranks if rank in rates and (link := rates[rank].node)]
        if own:
            inside[node.ranks[0]] = min(own)
    homes = {node.ranks[0]: node for node in nodes.all}
    return [
        f"node {homes[rank].label}: all-reduce within it at {inside[rank]:.3g} GB/s must be at least {share:.0%} of "
        f"the other nodes' median, {median:.3g}"
        for rank, median in below(inside, share).items()
    ]


def slow_links(rates: Mapping[int, Rates], nodes: Nodes, share: float) -> list[str]:
    """Nodes, or single ranks of them, that are slow over the network; and slow links between others."""
    links = {pair: link.gb_per_s for pair, link in links_of(rates).items()}
    partners: dict[int, list[float]] = defaultdict(list)
    for pair, rate in links.items():
        for rank in pair:
            partners[rank].append(rate)
    best = {rank: max(own) for rank, own in partners.items()}
    ranks = {rank: median for rank, median in below(best, share).items() if len(partners[rank]) > 1}
    faults = [
        f"{nodes.where(own)}: all-reduces with other nodes at {min(best[rank] for rank in own):.3g} GB/s at best must "
        f"be at least {share:.0%} of the other ranks' median, {ranks[own[0]]:.3g}"
        for own in by_node(ranks, nodes)
    ]
    for (first, second), median in below(links, share).items():
        if first not in ranks and second not in ranks:
            faults.append(
                f"link of {nodes.where([first])} ({listed([first])}) and {nodes.where([second])} ({listed([second])}): "
                f"all-reduce at {links[first, second]:.3g} GB/s must be at least {share:.0%} of the other links' "
                f"median, {median:.3g}"
            )
    return faults


def by_node(ranks: Mapping[int, float], nodes: Nodes) -> list[list[int]]:
    """Ranks in groups, those of a node together."""
    groups = ([rank for rank in node.ranks if rank in ranks] for node in nodes.all)
    return [group for group in groups if group]
