"""`megakor launch` on two hosts, loopback addresses with a real sshd: training, secrets, a host that is gone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megakor.train.exit_record import read_exit
from tests.config.commands import ROOT
from tests.distributed.runs import Made, curve
from tests.distributed.test_launcher import overrides
from tests.launch.sshd import MISSING, hosts_over_ssh
from tests.ranks import free_port

NAME, SECRET = "MLFLOW_TRACKING_TOKEN", "열려라참깨-4f1c9d"
"""A name that begins as those do which the `deepspeed` launcher puts on remote command lines."""
NUM_STEPS = 6
NAMESPACES = False  # loopback addresses are the hosts: for machines that permit no namespaces, too

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with hosts_over_ssh(tmp_path_factory.mktemp("ssh")) as environment:
        yield environment


def needed(*programs: str) -> None:
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} here")


class Launch:
    """`megakor launch pretrain` in a process of its own, all command lines of the machine looked at while it runs."""

    def __init__(self, made: Made, run: Path, ssh: dict[str, str], *arguments: str) -> None:
        self.run = run
        words = [*overrides(made, run), f"train.num_steps={NUM_STEPS}", "cluster.interface=lo",
                 f"cluster.secrets={NAME}", f"cluster.master_port={free_port()}", *arguments]  # fmt: skip
        self.command = [sys.executable, "-m", "megakor", "launch", "pretrain", *words]
        self.environment = {
            **os.environ, **ssh, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", NAME: SECRET,
            "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }  # fmt: skip
        self.seen: set[str] = set()

    def start(self, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, *more], cwd=self.run.parent, env=self.environment, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait(self, *processes: subprocess.Popen[str], timeout: float = 240) -> str:
        """What they said; all must end with status 0."""
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            for process in psutil.process_iter():
                try:
                    self.seen.add(" ".join(process.cmdline()))
                except psutil.Error:
                    continue
            time.sleep(0.2)
        for process in processes:
            if process.poll() is None:
                for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                    child.kill()
        said = "".join(process.communicate()[0] for process in processes)
        assert [process.returncode for process in processes] == [0] * len(processes), said
        return said


def host_file(folder: Path, *hosts: str) -> str:
    path = folder / "hosts"
    path.write_text("".join(f"{host} slots=1\n" for host in hosts))
    return f"cluster.hostfile={path}"


def check(launch: Launch, world_size: int, output: str) -> None:
    """It trained on so many ranks, and nobody could read the secret on the way."""
    assert [step for step, *_ in curve(launch.run)] == list(range(1, NUM_STEPS + 1))
    record = read_exit(launch.run)
    assert record is not None
    assert (record.outcome, record.world_size) == ("finished", world_size)
    assert any("megakor.pretrain" in line for line in launch.seen)
    assert not [line for line in launch.seen if SECRET in line]
    assert SECRET not in output
    holding = [path for path in launch.run.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert holding in ([], [launch.run / "launch" / "secrets"])
    assert all(path.stat().st_mode & 0o077 == 0 for path in holding)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "programs"), [("deepspeed", ["pdsh"]), ("openmpi", ["mpirun"])])
def test_two_hosts(made: Made, tmp_path: Path, ssh: dict[str, str], kind: str, programs: list[str]) -> None:
    needed(*programs)
    launch = Launch(made, tmp_path / "실행", ssh, f"cluster.kind={kind}", host_file(tmp_path, "127.0.0.1", "127.0.0.2"))
    check(launch, 2, launch.wait(launch.start()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deepspeed", "torchrun"])
def test_one_command_a_node(made: Made, tmp_path: Path, kind: str) -> None:
    where = ["cluster.num_nodes=2", "cluster.ranks_per_node=1", "cluster.master_address=127.0.0.1"]
    launch = Launch(made, tmp_path / "실행", {}, f"cluster.kind={kind}", "cluster.ssh=false", *where)
    nodes = [launch.start(f"cluster.node_rank={node}") for node in (1, 0)]
    check(launch, 2, launch.wait(*nodes))


@pytest.mark.slow
def test_a_host_that_is_gone(made: Made, tmp_path: Path, ssh: dict[str, str]) -> None:
    """The replicas were to be two; one is left. Without launch.elastic the run is refused, and the host named."""
    needed("pdsh")
    hosts = host_file(tmp_path, "127.0.0.1", "nobody.invalid")
    launch = Launch(made, tmp_path / "run", ssh, "cluster.kind=deepspeed", hosts, "parallel.data_parallel_size=2")
    refused = launch.start()
    said, _ = refused.communicate(timeout=120)
    assert refused.returncode == 1
    assert "every host must be reachable by ssh without a password, unlike nobody.invalid (" in said
    output = launch.wait(launch.start("launch.elastic=true"))
    check(launch, 1, output)
    assert "not reachable, going on without: nobody.invalid (" in output
    assert (launch.run / "launch" / "hostfile").read_text() == "127.0.0.1 slots=1\n"
