"""The hosts of a run: what a host file holds, which of it is used, and who can be reached.

    host file ─► include, exclude, num_nodes, ranks_per_node ─► {host: [slot, …]} ─► reachable ─► the first n slots

Files and selections are those of the `deepspeed` launcher (deepspeed/launcher/runner.py), which is not imported: it
takes seconds and prints. A slot is the number of an accelerator of its host.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

Hosts = dict[str, list[int]]
"""Slots of each host, in the order of ranks."""

LINE = re.compile(r"(\S+)\s+slots=(\d+)(\s.*)?")
SSH = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
"""Asks for no password, and takes a minute to give up a node that has gone silent."""
CHECK_SECONDS = 15.0
CHECKED_AT_ONCE = 64


def read_hosts(path: Path) -> Hosts:
    """The hosts of a file with a line `HOST slots=NUMBER` for each; empty lines and `#` comments are passed over.

    Raises:
        OSError: there is no such file.
        ValueError: a line is of another form, a host stands there twice, or none does.
    """
    if not path.is_file():
        raise FileNotFoundError(f"cluster.hostfile={path} must be a file with a line `HOST slots=NUMBER` for each host")
    hosts: Hosts = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        found = LINE.fullmatch(text)
        if found is None or int(found[2]) == 0:
            raise ValueError(f"cluster.hostfile={path}: line {number}, {text!r}, must be HOST slots=NUMBER, above 0")
        host = found[1]
        if host in hosts:
            where = f"lines {lines[host]} and {number}"
            raise ValueError(f"cluster.hostfile={path}: host {host} must be there once, and is on {where}")
        hosts[host], lines[host] = list(range(int(found[2]))), number
    if not hosts:
        raise ValueError(f"cluster.hostfile={path} must have a line `HOST slots=NUMBER` for each host, and has none")
    return hosts


def selection(key: str, text: str, hosts: Hosts) -> dict[str, list[int]]:
    """What `host@host:slot,slot` names; a host alone is all of its slots. ValueError where there is no such thing."""
    named: dict[str, list[int]] = {}
    for part in text.split("@"):
        host, colon, slots = part.partition(":")
        if host not in hosts:
            raise ValueError(f"{key}={text} must name hosts of the host file, not {host!r}: {', '.join(hosts)}")
        if colon and not re.fullmatch(r"\d+(,\d+)*", slots):
            raise ValueError(f"{key}={text} must be of the form HOST@HOST:SLOT,SLOT")
        chosen = [int(slot) for slot in slots.split(",")] if colon else hosts[host]
        missing = sorted(set(chosen) - set(hosts[host]))
        if missing:
            raise ValueError(f"{key}={text} must name slots that {host} has: {hosts[host]}, not {missing}")
        named[host] = sorted({*named.get(host, []), *chosen})
    return named


def select(hosts: Hosts, include: str, exclude: str) -> Hosts:
    """The hosts and slots that `include` names, or all but what `exclude` names; in the order of the host file."""
    if include:
        named = selection("cluster.include", include, hosts)
        return {host: named[host] for host in hosts if host in named}
    if not exclude:
        return hosts
    named = selection("cluster.exclude", exclude, hosts)
    left = {host: [slot for slot in slots if slot not in named.get(host, [])] for host, slots in hosts.items()}
    if not any(left.values()):
        raise ValueError(f"cluster.exclude={exclude} must leave a slot")
    return {host: slots for host, slots in left.items() if slots}


def trim(hosts: Hosts, num_nodes: int | None, ranks_per_node: int | None) -> Hosts:
    """The first nodes, and the first slots of each. ValueError where there are not as many."""
    if num_nodes is not None and num_nodes > len(hosts):
        raise ValueError(f"cluster.num_nodes={num_nodes} must be at most the {len(hosts)} hosts that are selected")
    for host, slots in hosts.items():
        if ranks_per_node is not None and ranks_per_node > len(slots):
            raise ValueError(
                f"cluster.ranks_per_node={ranks_per_node} must be at most the {len(slots)} slots of {host}"
            )
    return {host: slots[:ranks_per_node] for host, slots in list(hosts.items())[:num_nodes]}


def first_slots(hosts: Hosts, num_ranks: int) -> Hosts:
    """The slots of so many ranks, host after host."""
    used: Hosts = {}
    for host, slots in hosts.items():
        if num_ranks > 0:
            used[host] = slots[:num_ranks]
            num_ranks -= len(used[host])
    return used


def left_over(hosts: Hosts, used: Hosts) -> str:
    """The hosts and slots that are not used, in the words of `include`."""
    idle = {host: [slot for slot in slots if slot not in used.get(host, [])] for host, slots in hosts.items()}
    return "@".join(
        host if host not in used else f"{host}:{','.join(map(str, slots))}" for host, slots in idle.items() if slots
    )


def host_file(hosts: Hosts) -> str:
    """A host file that has these slots, and those before them on the same host."""
    return "".join(f"{host} slots={max(slots) + 1}\n" for host, slots in hosts.items())


def include_of(hosts: Hosts) -> str:
    """What selects exactly these slots from `host_file`; empty where they are all of it."""
    if all(slots == list(range(len(slots))) for slots in hosts.values()):
        return ""
    return "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in hosts.items())


def ssh_options() -> list[str]:
    """What ssh is called with: what `PDSH_SSH_ARGS_APPEND` says, which pdsh gives it too, and ours.

    ssh takes the first value that it is given for an option, so ours are for what is not said.
    """
    return [*shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")), *SSH]


def unreachable(hosts: Sequence[str]) -> dict[str, str]:
    """The hosts that do not answer over ssh, or lack this Python or this folder, each with the reason."""
    python, folder = shlex.quote(sys.executable), shlex.quote(os.getcwd())

    def fault(host: str) -> str:
        command = ["ssh", *ssh_options(), host, f"test -x {python} && test -d {folder}"]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return f"no answer in {CHECK_SECONDS:.0f} s"
        if done.returncode == 1:
            return f"it has no {sys.executable}, or no folder {os.getcwd()}"
        said = done.stderr.strip().splitlines()
        return "" if done.returncode == 0 else said[-1] if said else f"exit status {done.returncode}"

    with ThreadPoolExecutor(max_workers=CHECKED_AT_ONCE) as pool:
        faults = dict(zip(hosts, pool.map(fault, hosts), strict=True))
    return {host: why for host, why in faults.items() if why}


def is_here(host: str) -> bool:
    """Whether a name or address is this machine's own: a socket can be bound to it."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, _, _, _, address in found:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(address)
                return True
            except OSError:
                continue
    return False


def check_port(host: str, port: int) -> None:
    """Raise where the port that ranks are to meet at is in use. Nothing is known of another machine's ports."""
    if not is_here(host):
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections do not hold it
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            raise OSError(f"cluster.master_port={port} must be free on {host}: {error.strerror}") from None
