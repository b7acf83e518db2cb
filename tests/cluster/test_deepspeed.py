"""`megakor launch … cluster=deepspeed`: one command on the first host, or one on each, trains on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from megakor.drill.drill import TINY
from tests.cluster.hosts import INTERFACE, Cluster
from tests.cluster.training import (
    NUM_STEPS,
    PAIR_LENGTH,
    assert_as_undisturbed,
    goes_on_without_the_second,
    launch,
    megakor,
    ranks,
    starts,
    steps,
)
from tests.distributed.runs import Made

PROGRAMS = ("pdsh",)


def hostfile(path: Path, slots: dict[str, int]) -> list[str]:
    """The words that choose this kind of cluster, with a host file of so many slots for each host."""
    path.write_text("".join(f"{host} slots={number}\n" for host, number in slots.items()))
    return ["cluster=deepspeed", f"cluster.hostfile={path}"]


def test_two_hosts(cluster: Callable[[int], Cluster], made: Made, undisturbed: Path, tmp_path: Path) -> None:
    """A stage on each host, tensor ranks within it, all reached by pdsh."""
    hosts, run = cluster(2), tmp_path / "훈련"
    words = hostfile(tmp_path / "hosts", {"node-1": 2, "node-2": 2})
    layout = ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"]
    started = launch(hosts[1], made, run, *words, *layout)
    started.until(step=3)
    assert {name: len(found) for name, found in ranks(hosts).items()} == {"node-1": 2, "node-2": 2}
    started.finishes(world_size=4)
    assert_as_undisturbed(run, undisturbed)


def test_tuning_on_two_hosts(cluster: Callable[[int], Cluster], made: Made, undisturbed: Path, tmp_path: Path) -> None:
    """Adapters on the model of a run, a rank on each host."""
    hosts, run = cluster(2), tmp_path / "훈련"
    words = hostfile(tmp_path / "hosts", {"node-1": 1, "node-2": 1})
    tuning = [
        f"base={undisturbed}", f"tokenizer={made.tokenizer}", f"run={run}", "lora.rank=4",
        f"train.sequence_length={PAIR_LENGTH}", f"train.num_steps={NUM_STEPS}", f"cluster.interface={INTERFACE}",
    ]  # fmt: skip
    training = [word for word in TINY if not word.startswith("model")]
    started = megakor(hosts[1], run, "launch instruct", *training, *tuning, *words)
    started.finishes()
    assert starts(run) == [(0, 2)]
    losses = [record["loss"] for record in steps(run).values()]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_a_node_dies(cluster: Callable[[int], Cluster], made: Made, undisturbed: Path, tmp_path: Path) -> None:
    """Its processes and its address are gone at once; the run goes on without it, as if nothing had been."""
    hosts, run = cluster(3), tmp_path / "훈련"
    words = hostfile(tmp_path / "hosts", {"node-1": 1, "node-2": 1, "node-3": 1})
    started = launch(hosts[1], made, run, *words, "launch.restarts=3", "launch.elastic=true")
    goes_on_without_the_second(hosts, started, undisturbed)


def test_a_cable_is_pulled(cluster: Callable[[int], Cluster], made: Made, undisturbed: Path, tmp_path: Path) -> None:
    """No connection ends, so that all hang: the run is ended by its watchdog, and goes on without the silent node."""
    hosts, run = cluster(2), tmp_path / "훈련"
    words = hostfile(tmp_path / "hosts", {"node-1": 1, "node-2": 1})
    quick = ["health.hang_seconds=5", "launch.restarts=3", "launch.elastic=true"]
    patience = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=2 -o ServerAliveCountMax=3"}
    started = launch(hosts[1], made, run, *words, *quick, env=patience)
    started.until(step=12)
    hosts.unplug("node-2")
    pulled = time.monotonic()
    started.until(step=NUM_STEPS - 10, starts=2)
    print(f"{time.monotonic() - pulled:.1f} s from the pulled cable to the steps of the next start")
    started.finishes(world_size=1)
    assert "rank 1" in started.said()
    assert_as_undisturbed(run, undisturbed)


def test_one_command_on_each_host(
    cluster: Callable[[int], Cluster], made: Made, undisturbed: Path, tmp_path: Path
) -> None:
    """Without ssh between them."""
    hosts, run = cluster(2), tmp_path / "훈련"
    words = [*hostfile(tmp_path / "hosts", {"node-1": 1, "node-2": 1}), "cluster.ssh=false"]
    started = [launch(host, made, run, *words, f"cluster.node_rank={node}") for node, host in enumerate(hosts)]
    for each in started:
        each.finishes()
    assert starts(run) == [(0, 2)]
    assert_as_undisturbed(run, undisturbed)


def test_hosts_that_cannot_be_reached(cluster: Callable[[int], Cluster], made: Made, tmp_path: Path) -> None:
    """One line names the one that does not answer and the one that has no address, in seconds; nothing is started."""
    hosts, run = cluster(2), tmp_path / "훈련"
    hosts.unplug("node-2")
    words = hostfile(tmp_path / "hosts", {"node-1": 1, "node-2": 1, "node-9": 1})
    begin = time.monotonic()
    started = launch(hosts[1], made, run, *words, "launch.restarts=3")
    assert started.wait() != 0
    assert time.monotonic() - begin < 20, started.said()
    (error,) = [line for line in started.said().splitlines() if "error:" in line]
    for told in ("node-2", "node-9", "launch.elastic=true"):
        assert told in error
    assert "node-1" not in error
    assert "Traceback" not in started.said()
    assert not (run / "metrics.jsonl").exists()
