"""`megakor launch … cluster=torchrun`: the same command on every host but for the host's number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.cluster.hosts import Cluster
from tests.cluster.training import assert_as_undisturbed, launch, ranks, starts
from tests.distributed.runs import Made


def test_two_hosts(cluster: Callable[[int], Cluster], made: Made, undisturbed: Path, tmp_path: Path) -> None:
    """Their own names mean loopback addresses there, which `cluster.interface` makes good, as a preflight confirms."""
    hosts, run = cluster(2), tmp_path / "훈련"
    for host in hosts:
        host.name_as_debian_does()
    words = ["cluster=torchrun", "cluster.num_nodes=2", "cluster.ranks_per_node=1", "cluster.master_address=node-1",
             "launch.preflight=true"]  # fmt: skip
    first, second = (launch(host, made, run, *words, f"cluster.node_rank={node}") for node, host in enumerate(hosts))
    first.until(step=3)
    assert {name: len(found) for name, found in ranks(hosts).items()} == {"node-1": 1, "node-2": 1}
    for each in (first, second):
        each.finishes()
    assert starts(run) == [(0, 2)]
    assert_as_undisturbed(run, undisturbed)
