"""`launch.preflight=true` on hosts: a set-up with which ranks would wait for each other for minutes is found first."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.hosts import INTERFACE, Cluster, Host
from tests.cluster.training import launch, ranks
from tests.distributed.runs import Made

PROGRAMS = ("pdsh",)


def name_as_debian_does(host: Host) -> None:
    """Have a host's own name mean a loopback address there, as Debian's installer writes it."""
    lines = 'grep --invert-match --word-regexp "$(hostname)" /etc/hosts; echo "127.0.1.1 $(hostname)"'
    done = host.run("sh", "-c", f"{{ {lines}; }} > /run/hosts && mount --bind /run/hosts /etc/hosts")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("interface", ["null", INTERFACE])
def test_names_that_mean_loopback(
    cluster: Callable[[int], Cluster], made: Made, tmp_path: Path, interface: str
) -> None:
    """Without an interface gloo would take that address; with one, the same hosts train."""
    hosts, run = cluster(2), tmp_path / "훈련"
    for host in hosts:
        name_as_debian_does(host)
    (tmp_path / "hosts").write_text("node-1 slots=1\nnode-2 slots=1\n")
    words = ["cluster=deepspeed", f"cluster.hostfile={tmp_path / 'hosts'}", "launch.preflight=true"]
    begin = time.monotonic()
    started = launch(hosts[1], made, run, *words, f"cluster.interface={interface}")
    if interface == INTERFACE:
        started.finishes()
        return
    assert started.wait() != 0
    print(f"{time.monotonic() - begin:.1f} s until the fault is told")
    for address in ("127.0.1.1", "eth0 (10.77.0.1)", "eth0 (10.77.0.2)", "cluster.interface"):
        assert address in started.said(), started.said()
    assert "Traceback" not in started.said()
    assert not any(ranks(hosts).values())
    assert time.monotonic() - begin < 60
