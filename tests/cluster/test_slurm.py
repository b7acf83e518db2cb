"""`megakor launch … cluster=slurm`: a batch job that is cut short, queued again, and ends as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megakor.train.exit_record import read_exit
from tests.cluster.hosts import Cluster, wait_for
from tests.cluster.slurm import Slurm
from tests.cluster.training import assert_as_undisturbed, launch, ranks, starts, steps
from tests.distributed.runs import Made

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")


def submitted(hosts: Cluster, made: Made, run: Path, launcher: str) -> Slurm:
    """Slurm with a run on two nodes, of which 12 steps are done."""
    slurm = Slurm(hosts)
    words = [
        "cluster=slurm", "cluster.num_nodes=2", "cluster.ranks_per_node=1", "cluster.slurm.accelerator=''",
        "cluster.slurm.partition=spare", f"cluster.slurm.node_launcher={launcher}", "launch.restarts=3",
    ]  # fmt: skip
    started = launch(hosts[1], made, run, *words, env=slurm.environment)
    assert started.wait() == 0, started.said()
    wait_for(lambda: len(steps(run)) >= 12, 90, every=0.05)
    return slurm


def completes(slurm: Slurm) -> None:
    """Once it is in the queue again, the job is started and runs to its end."""
    wait_for(lambda: (slurm.job(1)["JobState"], slurm.job(1)["Restarts"]) == ("PENDING", "1"), 60, every=0.2)
    slurm("scontrol", "update", "JobId=1", "StartTime=now")  # Slurm itself would wait two minutes
    wait_for(lambda: slurm.job(1)["JobState"] == "COMPLETED", 90, every=0.2)


def test_preempted(cluster: Callable[[int], Cluster], made: Made, undisturbed: Path, tmp_path: Path) -> None:
    """A job that goes before takes the nodes: the run is given notice, saves and makes room."""
    hosts, run = cluster(2), tmp_path / "훈련"
    slurm = submitted(hosts, made, run, "torchrun")
    (rank,) = ranks([hosts[2]])["node-2"]
    rank.suspend()  # so that the run is not over before Slurm has made up its mind
    assert len(ranks([hosts[1]])["node-1"]) == 1
    slurm("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    wait_for((run / "STOP").exists, 30, every=0.1)
    rank.resume()
    wait_for(lambda: slurm.job(1)["JobState"] == "PENDING", 60, every=0.2)
    stopped = read_exit(run)
    assert stopped is not None
    assert stopped.outcome == "stopped"
    assert not (run / "STOP").exists()
    completes(slurm)
    assert slurm.job(2)["JobState"] == "COMPLETED"
    assert starts(run) == [(0, 2), (stopped.step, 2)]
    assert_as_undisturbed(run, undisturbed)


def test_a_node_dies(cluster: Callable[[int], Cluster], made: Made, undisturbed: Path, tmp_path: Path) -> None:
    """The job goes on with another node in its place."""
    hosts, run = cluster(3), tmp_path / "훈련"
    slurm = submitted(hosts, made, run, "deepspeed")
    hosts.hosts["node-2"].die()
    wait_for(lambda: "down" in slurm("sinfo", "--noheader", "--nodes=node-2", "--format=%T"), 60, every=0.2)
    completes(slurm)
    assert slurm.job(1)["NodeList"] == "node-[1,3]"
    (first, size), (resumed, size_after) = starts(run)
    assert (first, size, size_after) == (0, 2, 2)
    assert resumed >= 10
    assert_as_undisturbed(run, undisturbed)
