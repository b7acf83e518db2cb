"""Which device, node or link is called slow, from rates that are made up; and who meets whom."""

from __future__ import annotations

import itertools

import pytest

from megakor.preflight.compare import Nodes
from megakor.preflight.judge import below, links_of, slow
from megakor.preflight.rates import Link, Rates, rounds
from tests.preflight.people import NODE_SIZE, people


def measured(num_nodes: int, slow_ranks: tuple[int, ...] = (), slow_pairs: tuple[tuple[int, int], ...] = ()) -> dict:
    """Rates of healthy nodes at 20 GB/s, and 2 GB/s where a slow rank or pair takes part; a little spread."""
    rates = {rank: Rates(100.0 + rank % 3, Link(200.0 + rank % 2, 10.0)) for rank in range(num_nodes * NODE_SIZE)}
    for first, second in itertools.combinations(rates, 2):
        if first // NODE_SIZE != second // NODE_SIZE and (second - first) % NODE_SIZE == 0:
            bad = {first, second} & set(slow_ranks) or (first, second) in slow_pairs
            link = Link(2.0 if bad else 20.0 + (first + second) % 5 / 10, 30.0)
            rates[first].links[second] = rates[second].links[first] = link
    return rates


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4, 8, 32])
def test_healthy_machines(num_nodes: int) -> None:
    assert slow(measured(num_nodes), Nodes.of(people(num_nodes)), 0.7) == []


@pytest.mark.parametrize("num_nodes", [3, 4, 8, 32])
def test_a_slow_node_is_named_and_no_other(num_nodes: int) -> None:
    faults = slow(measured(num_nodes, slow_ranks=(2, 3)), Nodes.of(people(num_nodes)), 0.7)
    assert len(faults) == 1
    assert faults[0].startswith(
        "node node1: all-reduces with other nodes at 2 GB/s at best must be at least 70% of the other ranks' median, 20"
    )


def test_a_slow_network_card_is_named_by_its_rank() -> None:
    (fault,) = slow(measured(4, slow_ranks=(5,)), Nodes.of(people(4)), 0.7)
    assert fault.startswith("node node2, rank 5: all-reduces with other nodes at 2 GB/s at best")


def test_a_slow_link_between_healthy_nodes() -> None:
    (fault,) = slow(measured(4, slow_pairs=((2, 6),)), Nodes.of(people(4)), 0.7)
    assert fault.startswith("link of node node1, rank 2 (rank 2) and node node3, rank 6 (rank 6): all-reduce at 2 GB/s")


def test_of_two_nodes_the_link_is_named() -> None:
    """Nothing tells which end is to blame."""
    (fault,) = slow(measured(2, slow_pairs=((1, 3),)), Nodes.of(people(2)), 0.7)
    assert fault.startswith("link of ")


def test_slow_devices_and_a_slow_inside() -> None:
    rates = measured(4)
    rates[6].matmul_tflops, rates[7].matmul_tflops = 60.0, 50.0
    rates[1].node = Link(90.0, 10.0)
    assert slow(rates, Nodes.of(people(4)), 0.7) == [
        "node node3: matmul at 50 TFLOP/s must be at least 70% of the other ranks' median, 101",
        "node node0: all-reduce within it at 90 GB/s must be at least 70% of the other nodes' median, 200",
    ]


def test_the_median_is_of_the_others() -> None:
    assert below({"a": 1.0, "b": 0.69}, 0.7) == {"b": 1.0}
    assert below({"a": 1.0, "b": 0.71}, 0.7) == {}
    assert below({"a": 1.0}, 0.7) == {}


def test_a_link_is_as_fast_as_its_slower_end_says() -> None:
    rates = {0: Rates(links={2: Link(3.0, 1.0)}), 2: Rates(links={0: Link(2.0, 1.0)})}
    assert links_of(rates) == {(0, 2): Link(2.0, 1.0)}


@pytest.mark.parametrize("num_nodes", range(1, 34))
def test_rounds_let_every_node_meet_every_other_one_once(num_nodes: int) -> None:
    all_rounds = list(rounds(num_nodes))
    assert len(all_rounds) == (0 if num_nodes == 1 else num_nodes - 1 + num_nodes % 2)
    met: list[tuple[int, int]] = []
    for opponents in all_rounds:
        for node, other in enumerate(opponents):
            if other is not None:
                assert opponents[other] == node  # disjoint pairs
                met.append((node, other))
    assert sorted(met) == sorted(itertools.permutations(range(num_nodes), 2))


def test_rates_travel_as_json() -> None:
    rates = Rates(1.5, Link(1.0, 2.0), {3: Link(4.0, 5.0)}, 1, ["all-reduce to rank 7: broken"])
    assert Rates.from_json(rates.as_json()) == rates
