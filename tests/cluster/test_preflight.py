"""`launch.preflight=true` on hosts: a set-up with which ranks would wait for each other for minutes is found first."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.hosts import Cluster
from tests.cluster.training import launch, ranks
from tests.distributed.runs import Made

PROGRAMS = ("pdsh",)


def test_names_that_mean_loopback(cluster: Callable[[int], Cluster], made: Made, tmp_path: Path) -> None:
    """Without an interface gloo would take that address; test_torchrun.py has such hosts with one."""
    hosts, run = cluster(2), tmp_path / "훈련"
    for host in hosts:
        host.name_as_debian_does()
    (tmp_path / "hosts").write_text("node-1 slots=1\nnode-2 slots=1\n")
    words = ["cluster=deepspeed", f"cluster.hostfile={tmp_path / 'hosts'}", "cluster.interface=null"]
    begin = time.monotonic()
    started = launch(hosts[1], made, run, *words, "launch.preflight=true")
    assert started.wait() != 0
    assert time.monotonic() - begin < 60
    for told in ("127.0.1.1", "eth0 (10.77.0.1)", "eth0 (10.77.0.2)", "cluster.interface"):
        assert told in started.said(), started.said()
    assert "Traceback" not in started.said()
    assert not any(ranks(hosts).values())
