"""Hosts of a cluster, all on this machine, each with a real sshd and an address of its own.

A host is a tree of processes in Linux namespaces of its own: process numbers, network, host name, mounts. Its first
process is sshd. Killed, the kernel ends every other process there at once: a node that dies. The hosts hang on a
bridge, which has a namespace, too, so this machine's own network, processes and files know nothing of them, and nothing
is left of them when they end, however that comes about.

They share this machine's files, as nodes share a file system. Where a host needs other files than this machine's, such
as /etc/hosts, one of the cluster's folder lies over it, for that host alone.

    Cluster ─► bridge ─┬─ node-1: eth0 10.77.0.1, sshd ─► what is run there
                       └─ node-2: eth0 10.77.0.2, sshd
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

from tests.config.commands import ROOT

INTERFACE = "eth0"
"""Of every host: ranks that talk over it need no other setting on any of them."""

NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid")

PROGRAMS = ("ip", "setpriv", "unshare", "nsenter", "mount", "hostname", "ssh", "ssh-keygen", "/usr/sbin/sshd")
PROBE = """
set -e
ip link add name bridge type bridge
ip link add name one type veth peer name other
mount -t tmpfs tmpfs /run
setpriv --reuid sshd --clear-groups true
"""
"""What hosts are made of, and what sshd does."""

BOOT = """
set -e
name=$1 folder=$2 address=$3 interface=$4
hostname "$name"
ip link set lo up
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir /run/sshd
(cd "$folder/over" && find . -type f) | while read -r file; do mount --bind "$folder/over/$file" "/$file"; done
until ip link show "$interface" >/dev/null 2>&1; do sleep 0.02; done
ip address add "$address/24" dev "$interface"
ip link set "$interface" up
exec /usr/sbin/sshd -D -e -f "$folder/sshd_config"
"""
"""What the first process of a host does before it is sshd."""

SSHD = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
PidFile none
LogLevel ERROR
"""

SSH = """\
Host *
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  GlobalKnownHostsFile {folder}/known_hosts
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking yes
"""


@functools.cache
def missing(*programs: str) -> str | None:
    """Why there can be no hosts with these programs on this machine; None when there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts are made of Linux namespaces, which needs root"
    for program in (*PROGRAMS, *programs):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "--mount-proc", "sh", "-c", PROBE],
                           capture_output=True, text=True)  # fmt: skip
    return None if tried.returncode == 0 else f"this machine permits no hosts of namespaces: {tried.stderr.strip()}"


def in_namespaces(*command: str, log: IO[bytes]) -> tuple[subprocess.Popen[bytes], int]:
    """Start a command as the first process of namespaces of its own; they end with it, and it with this process.

    Returns:
        `unshare`, which waits for it, and its own number, as this machine counts.
    """
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "--fork", "--mount-proc", "--kill-child", *command],
        stdin=subprocess.DEVNULL, stdout=log, stderr=log,
    )  # fmt: skip
    return process, wait_for(lambda: next((child.pid for child in psutil.Process(process.pid).children()), None))


def wait_for(found: Callable[[], Any], seconds: float = 10.0, every: float = 0.01) -> Any:
    """What `found` returns once it is true.

    AssertionError when that takes longer.
    """
    deadline = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(every)
    return answer


class Host:
    """A host that is up. `Cluster` makes them.

    Attributes:
        name: its host name, which all hosts know.
        address: on the bridge.
        first: number of its first process, as this machine counts.
    """

    def __init__(self, name: str, address: str, folder: Path, log: IO[bytes]) -> None:
        self.name, self.address = name, address
        command = ["sh", "-c", BOOT, "boot", name, str(folder), address, INTERFACE]
        self.process, self.first = in_namespaces(*command, log=log)

    def command(self, *command: str) -> list[str]:
        """A command line that runs another one on this host."""
        return ["nsenter", "--target", str(self.first), *NAMESPACES, "--", *command]

    def run(self, *command: str, timeout: float = 120.0, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command here, and wait for it."""
        process = self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            end(process)
            raise
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def start(self, *command: str, cwd: Path = ROOT, **options: Any) -> subprocess.Popen[str]:
        """Start a command here, with the environment of someone who works in this checkout; it leads a session."""
        there = self.command("env", f"--chdir={cwd}", *command)
        full = environment() | options.pop("env", {})
        return subprocess.Popen(there, env=full, text=True, stdin=subprocess.DEVNULL, start_new_session=True, **options)

    def processes(self) -> list[psutil.Process]:
        """All of this host."""
        found = []
        for process in psutil.process_iter():
            with suppress(OSError):
                if os.readlink(f"/proc/{process.pid}/ns/pid") == os.readlink(f"/proc/{self.first}/ns/pid"):
                    found.append(process)
        return found

    def name_as_debian_does(self) -> None:
        """Have its own name mean a loopback address there, as Debian's installer writes it."""
        script = f"{{ grep -vw {self.name} /etc/hosts; echo 127.0.1.1 {self.name}; }} > /run/hosts"
        done = self.run("sh", "-c", f"{script} && mount --bind /run/hosts /etc/hosts")
        assert done.returncode == 0, done.stderr

    def die(self) -> None:
        """End every process of it at once; its address answers no more."""
        if self.process.poll() is None:
            os.kill(self.first, signal.SIGKILL)
            self.process.wait(10)


class Cluster:
    """So many hosts, node-1 first, on a bridge. A context manager: its end is theirs.

    Args:
        folder: for keys and configuration; the hosts' addresses are 10.77.0.1, 10.77.0.2 and so on.
    """

    def __init__(self, folder: Path, num_hosts: int) -> None:
        self.folder = folder
        self.addresses = {f"node-{number}": f"10.77.0.{number}" for number in range(1, num_hosts + 1)}
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> Cluster:
        self._configure()
        self.log = (self.folder / "hosts.log").open("ab")
        script = "ip link add bridge type bridge && ip link set bridge up && exec sleep infinity"
        self.process, self.bridge = in_namespaces("sh", "-c", script, log=self.log)
        try:
            wait_for(lambda: self._at_bridge("show", "dev", "bridge", "up", check=False))
            for name in self.addresses:
                self.boot(name)
        except BaseException:
            print((self.folder / "hosts.log").read_text())
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for host in self.hosts.values():
            host.die()
        self.process.kill()
        self.process.wait(10)
        self.log.close()

    def __getitem__(self, number: int) -> Host:
        """node-1, node-2 …"""
        return self.hosts[f"node-{number}"]

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts.values())

    def boot(self, name: str) -> Host:
        """Start a host, also one that has died. It takes ssh connections when this returns."""
        self._at_bridge("delete", name, check=False)  # of one that has died the kernel takes its time to
        host = self.hosts[name] = Host(name, self.addresses[name], self.folder, self.log)
        # Its address on the wire stays, too: the others know it, and would look for another one only after seconds.
        wire = f"02:00:0a:4d:00:{int(host.address.rpartition('.')[2]):02x}"
        peer = ["peer", "name", INTERFACE, "address", wire, "netns", str(host.first)]
        self._at_bridge("add", "name", name, "type", "veth", *peer)
        self._at_bridge("set", name, "master", "bridge", "up")
        wait_for(lambda: host.run("ssh", name, "true").returncode == 0, every=0.05)
        return host

    def unplug(self, name: str) -> None:
        """Pull a host's network cable: nobody there is told."""
        self._at_bridge("set", name, "down")

    def _at_bridge(self, *arguments: str, check: bool = True) -> str:
        command = ["nsenter", "--target", str(self.bridge), "--net", "ip", "link", *arguments]
        return subprocess.run(command, check=check, capture_output=True, text=True).stdout

    def _configure(self) -> None:
        """Keys that all hosts share, and what each has in place of this machine's configuration."""
        over = self.folder / "over" / "etc"
        (over / "ssh").mkdir(parents=True)
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key)], check=True)
        public = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text(f"{','.join([*self.addresses, *self.addresses.values()])} {public}")
        (self.folder / "sshd_config").write_text(SSHD.format(folder=self.folder))
        (over / "ssh" / "ssh_config").write_text(SSH.format(folder=self.folder))
        names = "".join(f"{address} {name}\n" for name, address in self.addresses.items())
        (over / "hosts").write_text(f"127.0.0.1 localhost\n{names}")


def environment() -> dict[str, str]:
    """Of a shell in which megakor is installed."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a process that `Host.start` started, and its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
