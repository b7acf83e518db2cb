"""What rank 0 makes of identities: accelerators, many nodes and broken places are made up, the rules are not."""

from __future__ import annotations

from typing import Any

import pytest

from megakor.preflight.compare import GIB, Nodes, faults_of, listed
from tests.preflight.people import people


def test_healthy_nodes_have_no_faults() -> None:
    assert faults_of(people(4), 8, 30) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"r3": {"num_devices": 1}},
         "node node1, rank 3: LOCAL_RANK=1 must be below its 1 devices"),
        ({"r2": {"num_devices": 1}},
         "node node1: 2 ranks must be at most the 1 devices that they see"),
        ({"r3": {"device_free": 12 * GIB}},
         "node node1, rank 3: 12.0 GiB of 80.0 GiB of device memory are free, must be 90%: another process holds the "
         "rest"),
        ({"r2": {"shared_free": 64 * 2**20}},
         "node node1: /dev/shm must have 1024 MiB free for NCCL, and has 64 MiB"),
        ({"r2": {"local_size": 8}},
         "node node1: LOCAL_WORLD_SIZE=8 must be the number of its ranks, 2"),
        ({"r2": {"library_address": "127.0.0.1"}},
         "node node1: NCCL would take address 127.0.0.1, which no other node reaches; cluster.interface "
         "(NCCL_SOCKET_IFNAME) must name one of ib0 (10.0.0.1)"),
        ({"r2": {"address": "fe80::1%eth0", "usable": []}},
         "node node1: gloo would take address fe80::1%eth0, which no other node reaches, as the host name node1 means; "
         "cluster.interface (GLOO_SOCKET_IFNAME) must name one of none is up"),
        ({"r2": {"versions": {"torch": "2.6.0"}}, "r3": {"versions": {"torch": "2.6.0"}}},
         "node node1: torch=2.6.0 must be 2.13.0, as on the other ranks"),
        ({"r0": {"versions": {"torch": "2.6.0"}}},
         "node node0, rank 0: torch=2.6.0 must be 2.13.0, as on the other ranks"),
        ({"r5": {"problems": ["something must be so"]}},
         "node node2, rank 5: something must be so"),
        ({"r4": {"config": {"train.seed": 2, "train.extra": [1]}}},
         "node node2, rank 4: train.extra=[1] must be absent, train.seed=2 must be 1, as on the other ranks"),
    ],
)  # fmt: skip
def test_a_fault_names_node_rank_value_and_rule(changes: dict[str, dict[str, Any]], fault: str) -> None:
    assert faults_of(people(4, **changes), 8, 30) == [fault]


def test_addresses_of_one_node_may_be_loopback() -> None:
    lone = {rank: {"address": "127.0.0.1", "library_address": "127.0.0.1"} for rank in ("r0", "r1")}
    assert faults_of(people(1, **lone), 2, 30) == []


def test_missing_ranks_are_named_beside_whom_they_would_stand() -> None:
    come = {rank: one for rank, one in people(4).items() if rank not in (3, 6, 7)}
    assert faults_of(come, 8, 30) == [
        "rank 3 on node node1; ranks 6, 7 on the node of rank 6: must come to rank 0 within 30 s; "
        "5 of 8 ranks have come"
    ]


def test_many_differences_are_one_line() -> None:
    packages = {f"package-{number}": "1" for number in range(9)}
    everyone = {f"r{rank}": {"packages": packages} for rank in range(8)}
    everyone["r1"] = {"packages": dict.fromkeys(packages, "2")}
    (fault,) = faults_of(people(4, **everyone), 8, 30)
    assert fault.startswith("node node0, rank 1: package-0=2 must be 1, ")
    assert fault.endswith(", and 5 more, as on the other ranks")


def test_hosts_of_one_name_are_told_apart_by_address() -> None:
    same = {f"r{rank}": {"host": "worker"} for rank in range(4)}
    assert [node.label for node in Nodes.of(people(2, **same)).all] == ["worker (10.0.0.1)", "worker (10.0.0.2)"]


def test_where() -> None:
    nodes = Nodes.of(people(3))
    assert nodes.where([0, 1]) == "node node0"
    assert nodes.where([1, 2, 3]) == "node node0, rank 1 and node node1"
    assert nodes.where(range(6)) == "every node"
    assert listed([5]) == "rank 5"
    assert listed([0, 1, 2, 3, 6, 8, 9]) == "ranks 0-3, 6, 8, 9"
