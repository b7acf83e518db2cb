"""Who a rank is: what must be the same everywhere, and what its place offers. One small message to rank 0.

About 15 kB a rank: the versions of 150 packages and 150 keys of the configuration, so that rank 0 can name a
difference, and not only that there is one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import megakor
from megakor.config.schema import EngineConfig
from megakor.preflight.addresses import Interfaces, Listener, gloo_address, nccl_address
from megakor.train.device import (
    communication_library,
    device_memory,
    device_name,
    is_cpu,
    local_world_size,
    num_devices,
)
from megakor.train.run import flat, plain

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Identity:
    """A rank and its place.

    Attributes:
        host: the machine's name.
        machine: what tells nodes of one name apart: containers and network namespaces are nodes of their own.
        local_size: ranks of this node, as the launcher says.
        address, interface: where gloo listens.
        library_address: where NCCL listens; that of gloo on a CPU.
        port: at `address`, which takes connections until the nodes have tried to reach each other; 0: none.
        num_devices: accelerators that it sees; 0 on a CPU.
        device_free, device_total: bytes of its device.
        host_free, shared_free: bytes of the host's memory and of /dev/shm.
        master: the address where ranks meet, as it is given.
        usable: interfaces that other nodes may reach.
        versions: of the software, and the fingerprint of megakor's own code.
        packages: versions of everything that is installed: an optional package changes what another one does.
        config: the run's configuration by dotted keys.
        problems: what kept it from telling all this.
    """

    rank: int
    local_rank: int
    local_size: int
    host: str
    machine: str
    address: str
    interface: str
    library_address: str
    port: int
    num_devices: int
    device: str
    device_free: int
    device_total: int
    host_free: int
    shared_free: int
    master: str
    usable: list[str]
    versions: dict[str, str]
    packages: dict[str, str]
    config: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def fingerprint(self) -> str:
        """The first digits of the SHA-256 of the configuration."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:12]


def identify(config: EngineConfig, rank: int, interfaces: Interfaces) -> tuple[Identity, Listener | None]:
    """This rank, and on the first rank of a node what listens at its address."""
    problems: list[str] = []
    address = library_address = ""
    try:
        address = library_address = gloo_address(interfaces)
        if not is_cpu():
            library_address = nccl_address(interfaces)
    except ValueError as error:
        problems.append(str(error))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    listener = None
    if local_rank == 0 and address:
        try:
            listener = Listener(library_address)
        except OSError as error:
            problems.append(f"address={library_address} must be one to listen at: {error}")
    free, total = device_memory() if is_cpu() or local_rank < num_devices() else (0, 0)
    identity = Identity(
        rank=rank,
        local_rank=local_rank,
        local_size=local_world_size(),
        host=socket.gethostname(),
        machine=machine(),
        address=address,
        interface=interfaces.of(address),
        library_address=library_address,
        port=listener.port if listener else 0,
        num_devices=num_devices(),
        device=device_name() if total else "",
        device_free=free,
        device_total=total,
        host_free=psutil.virtual_memory().available,
        shared_free=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0,
        master=os.environ["MASTER_ADDR"],
        usable=interfaces.usable(),
        versions=versions(),
        packages=packages(),
        config=flat(plain(config)),
        problems=problems,
    )
    return identity, listener


def machine() -> str:
    """What is one node's alone: its name, the start of its kernel, and the network namespace."""
    boot, network = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    started = boot.read_text().strip() if boot.is_file() else ""
    return f"{socket.gethostname()} {started} {network.stat().st_ino if network.exists() else ''}"


def versions() -> dict[str, str]:
    """Of what computes and communicates, and megakor's code."""
    found = packages()
    folder = Path(megakor.__file__).parent
    return {
        "python": platform.python_version(),
        **{name: found.get(name, "absent") for name in ("torch", "deepspeed")},
        "collectives": communication_library(),
        "megakor": megakor.__version__,
        "megakor's code": code_fingerprint(folder)[:12],
    }


def packages() -> dict[str, str]:
    """Version of every installed distribution; of one that is there twice, the one that is imported."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name not in ("", "megakor"):  # whose code is compared itself
            found.setdefault(name, distribution.version)
    return found


def code_fingerprint(folder: Path) -> str:
    """SHA-256 over the package's files: their names and contents, in order; what Python compiles is left out."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()
