"""The hosts are what the other tests take them for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import INTERFACE, Cluster
from tests.config.commands import ROOT

UNREACHED = 255
"""Of ssh."""


def network() -> str:
    """This machine's own interfaces and mounts."""
    shown = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
    return shown + Path("/proc/self/mounts").read_text()


def test_each_has_its_own_name_address_and_processes(cluster: Callable[[int], Cluster]) -> None:
    before = network()
    hosts = cluster(2)
    told = hosts[1].run("ssh", "node-2", f"hostname; hostname -I; ip -brief address show {INTERFACE}; ps -e -o comm=")
    name, address, interface, *processes = told.stdout.splitlines()
    assert (name, address.split(), interface.split()[2]) == ("node-2", ["10.77.0.2"], "10.77.0.2/24")
    assert set(processes) <= {"sshd", "bash", "sh", "ps"}
    assert hosts[2].run("getent", "hosts", "node-1").stdout.split() == ["10.77.0.1", "node-1"]
    assert hosts[1].run("pwd", cwd=ROOT).stdout == f"{ROOT}\n"
    assert network() == before
    assert not Path("/etc/netns").exists()


def test_one_dies_and_comes_back(cluster: Callable[[int], Cluster]) -> None:
    hosts = cluster(2)
    sleeping = hosts[2].start("sleep", "600")
    there = hosts[2].processes()
    hosts.hosts["node-2"].die()
    assert sleeping.wait(10) != 0
    assert not any(process.is_running() for process in there)
    check = ["ssh", "-o", "ConnectTimeout=1", "node-2", "true"]
    assert hosts[1].run(*check).returncode == UNREACHED
    hosts.boot("node-2")
    assert hosts[1].run(*check).returncode == 0
    hosts.unplug("node-2")
    assert hosts[1].run(*check).returncode == UNREACHED


@pytest.mark.parametrize("ended", ["terminate", "kill"])
def test_nothing_outlives_the_process_that_made_them(tmp_path: Path, ended: str) -> None:
    """Not even when that is killed."""
    script = (
        "import sys, time; from pathlib import Path; from tests.cluster.hosts import Cluster\n"
        "with Cluster(Path(sys.argv[1]), 1) as hosts:\n"
        "    hosts[1].start('sleep', '600'); print(flush=True); time.sleep(600)"
    )
    maker = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert maker.stdout is not None
    maker.stdout.readline()
    made = psutil.Process(maker.pid).children(recursive=True)
    assert {"sshd", "sleep"} <= {process.name() for process in made}
    getattr(maker, ended)()
    maker.wait(10)
    _, alive = psutil.wait_procs(made, timeout=10)
    assert alive == []
