"""`megakor launch … cluster=openmpi`: mpirun, which reaches the hosts by ssh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.cluster.hosts import Cluster
from tests.cluster.training import assert_as_undisturbed, goes_on_without_the_second, launch, ranks, starts
from tests.distributed.runs import Made

PROGRAMS = ("mpirun",)
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_orte_tmpdir_base": "/dev/shm",
}
"""The hosts need root; a host's own files lie where no other host sees them."""


def test_two_hosts(cluster: Callable[[int], Cluster], made: Made, undisturbed: Path, tmp_path: Path) -> None:
    hosts, run = cluster(2), tmp_path / "훈련"
    file = tmp_path / "hosts"
    file.write_text("node-1 slots=1\nnode-2 slots=1\n")
    started = launch(hosts[1], made, run, "cluster=openmpi", f"cluster.hostfile={file}", env=ENVIRONMENT)
    started.until(step=3)
    assert {name: len(found) for name, found in ranks(hosts).items()} == {"node-1": 1, "node-2": 1}
    started.finishes()
    assert starts(run) == [(0, 2)]
    assert_as_undisturbed(run, undisturbed)


def test_a_node_dies(cluster: Callable[[int], Cluster], made: Made, undisturbed: Path, tmp_path: Path) -> None:
    """mpirun ends the others, and is started again without it."""
    hosts, run = cluster(3), tmp_path / "훈련"
    file = tmp_path / "hosts"
    file.write_text("node-1 slots=1\nnode-2 slots=1\nnode-3 slots=1\n")
    words = ["cluster=openmpi", f"cluster.hostfile={file}", "launch.restarts=3", "launch.elastic=true"]
    started = launch(hosts[1], made, run, *words, env=ENVIRONMENT)
    goes_on_without_the_second(hosts, started, undisturbed)
