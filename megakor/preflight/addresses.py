"""The addresses that gloo and NCCL take on this machine, and whether the other nodes reach them.

gloo asks what the machine's own name means, and takes the loopback address where a line of /etc/hosts says so: the
other nodes then wait for it for minutes. `GLOO_SOCKET_IFNAME` names an interface instead (`cluster.interface`). NCCL
looks at the interfaces themselves.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil

LOOPBACK = "127.0.0.1"
NUM_CONNECTING = 32


@dataclass(frozen=True)
class Interfaces:
    """A machine's interfaces that are up: name -> addresses, in the system's order, IPv4 first."""

    addresses: dict[str, list[str]]

    @classmethod
    def of_this_machine(cls) -> Interfaces:
        up = {name for name, state in psutil.net_if_stats().items() if state.isup}
        families = (socket.AF_INET, socket.AF_INET6)
        found = {
            name: [entry.address for family in families for entry in entries if entry.family == family]
            for name, entries in psutil.net_if_addrs().items()
            if name in up
        }
        return cls({name: addresses for name, addresses in found.items() if addresses})

    def of(self, address: str) -> str:
        """The interface that has an address; empty where none has."""
        return next((name for name, own in self.addresses.items() if address in own), "")

    def usable(self) -> list[str]:
        """`eth0 (10.0.0.1)` of those that others may reach."""
        first = {name: addresses[0] for name, addresses in self.addresses.items()}
        return [f"{name} ({address})" for name, address in first.items() if reachable_by_others(address)]


def reachable_by_others(address: str) -> bool:
    """Whether an address is one that another machine can use: neither loopback nor bound to a link."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return not (parsed.is_loopback or parsed.is_link_local)


def gloo_address(interfaces: Interfaces, environment: Mapping[str, str] = os.environ) -> str:
    """What gloo will listen on, as PyTorch's ProcessGroupGloo chooses it.

    The first interface of GLOO_SOCKET_IFNAME; else the first address of this machine's name that a socket can be bound
    to; else loopback.

    Raises:
        ValueError: there is no such interface.
    """
    given = environment.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if given:
        if given not in interfaces.addresses:
            raise ValueError(
                f"GLOO_SOCKET_IFNAME={given} (cluster.interface) must be an interface that is up: "
                f"{', '.join(interfaces.addresses)}"
            )
        return interfaces.addresses[given][0]
    try:
        candidates = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except socket.gaierror:
        candidates = []
    for family, kind, protocol, _, place in candidates:
        with socket.socket(family, kind, protocol) as tried:
            try:
                tried.bind(place)
            except OSError:
                continue
            return str(place[0])
    return LOOPBACK


def nccl_address(interfaces: Interfaces, environment: Mapping[str, str] = os.environ) -> str:
    """What NCCL's bootstrap will listen on, as its documentation of NCCL_SOCKET_IFNAME says.

    A list of prefixes, of whole names after `=`, or of what to leave out after `^`; without it InfiniBand's interfaces,
    then the others, then those of Docker, then loopback.

    Raises:
        ValueError: no interface fits NCCL_SOCKET_IFNAME.
    """
    given = environment.get("NCCL_SOCKET_IFNAME", "")
    names = list(interfaces.addresses)
    if given:
        excluded, exact = given.startswith("^"), "=" in given[:2]
        words = given.lstrip("^=").split(",")
        fitting = [name for name in names if any(name == w if exact else name.startswith(w) for w in words)]
        names = [name for name in names if name not in fitting] if excluded else fitting
        if not names:
            raise ValueError(
                f"NCCL_SOCKET_IFNAME={given} (cluster.interface) must fit an interface that is up: "
                f"{', '.join(interfaces.addresses)}"
            )
    orders = ("ib", "", "docker", "lo")
    names.sort(key=lambda name: next((n for n, p in enumerate(orders) if p and name.startswith(p)), 1))
    return interfaces.addresses[names[0]][0] if names else LOOPBACK


class Listener:
    """Listens at an address, so that other nodes can try to reach it; the kernel takes their connections."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.socket = socket.create_server((address, 0), family=family, backlog=1024)
        self.port: int = self.socket.getsockname()[1]

    def close(self) -> None:
        self.socket.close()


def unreachable(places: Mapping[str, tuple[str, int]], seconds: float) -> dict[str, str]:
    """Why each place that does not take a connection within so many seconds does not.

    Args:
        places: address and port by any name.
    """

    def connect(place: tuple[str, int]) -> str | None:
        try:
            socket.create_connection(place, timeout=seconds).close()
        except OSError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(NUM_CONNECTING) as threads:
        found = zip(places, threads.map(connect, places.values()), strict=True)
        return {name: why for name, why in found if why is not None}
