"""`megakor launch … cluster=slurm`: a batch job that is preempted, queued again, and ends as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megakor.train.exit_record import read_exit
from tests.cluster.hosts import Cluster, wait_for
from tests.cluster.slurm import Slurm
from tests.cluster.training import assert_as_undisturbed, launch, ranks, starts, steps
from tests.distributed.runs import Made

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_preempted(
    cluster: Callable[[int], Cluster], made: Made, undisturbed: Path, tmp_path: Path, launcher: str
) -> None:
    hosts, run = cluster(2), tmp_path / "훈련"
    slurm = Slurm(hosts)
    words = ["cluster=slurm", "cluster.num_nodes=2", "cluster.ranks_per_node=1", "cluster.slurm.accelerator=''",
             f"cluster.slurm.node_launcher={launcher}", "cluster.slurm.partition=spare"]  # fmt: skip
    submitted = launch(hosts[1], made, run, *words, env=slurm.environment)
    assert submitted.wait() == 0, submitted.said()
    wait_for(lambda: len(steps(run)) >= 12, 90, every=0.05)
    assert {name: len(found) for name, found in ranks(hosts).items()} == {"node-1": 1, "node-2": 1}
    slurm(1, "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    wait_for(lambda: (slurm.job(1)["JobState"], slurm.job(1)["Restarts"]) == ("PENDING", "1"), 60, every=0.2)
    stopped = read_exit(run)
    assert stopped is not None
    assert stopped.outcome == "stopped"
    assert not (run / "STOP").exists()
    slurm(1, "scontrol", "update", "JobId=1", "StartTime=now")  # Slurm itself would wait two minutes
    wait_for(lambda: slurm.job(1)["JobState"] == "COMPLETED", 90, every=0.2)
    assert starts(run) == [(0, 2), (stopped.step, 2)]
    assert_as_undisturbed(run, undisturbed)
