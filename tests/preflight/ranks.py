"""Ranks of a preflight on this machine, each a process of its own; each may have a host name, a folder and a clock.

A rank's node is told by its host name, which Python is made to believe here. gloo itself asks the system, so runs of
several nodes name an interface that is not the loopback's.
"""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from megakor.config.schema import EngineConfig
from megakor.preflight.addresses import Interfaces, reachable_by_others
from tests.ranks import context, free_port

TIMEOUT = 100.0


@dataclass
class Seat:
    """How a rank comes.

    Attributes:
        config: its configuration.
        host: its host name; None: this machine's.
        folder: its working directory.
        environment: variables beyond the launcher's.
        before: called in its process before the preflight.
    """

    config: EngineConfig
    host: str | None = None
    folder: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    before: Callable[[], None] | None = None


@dataclass
class Came:
    """How a rank's preflight ended: its faults, or its error; and on rank 0 the report."""

    faults: list[str]
    error: str | None
    report: Any


def outside_interface() -> tuple[str, str]:
    """Name and address of an interface that other machines could reach; skips the test where there is none."""
    for name, addresses in Interfaces.of_this_machine().addresses.items():
        if reachable_by_others(addresses[0]):
            return name, addresses[0]
    pytest.skip("this machine has no interface but the loopback's, and nodes need another")


def two_nodes(config: EngineConfig) -> list[Seat]:
    """A rank on each of two nodes."""
    name, _ = outside_interface()
    return [Seat(config, host, environment={"GLOO_SOCKET_IFNAME": name}) for host in ("a", "b")]


def _fly(answer: Any, seat: Seat, environment: dict[str, str], seconds: float) -> None:
    os.environ |= environment | seat.environment
    if seat.host is not None:
        socket.gethostname = lambda: str(seat.host)
    if seat.folder is not None:
        os.chdir(seat.folder)
    import torch

    from megakor.preflight.flight import Faulty, Preflight
    from megakor.train.run import process_group

    torch.set_num_threads(1)
    flight, error = None, None
    try:
        if seat.before is not None:
            seat.before()
        # Ranks share two cores with whatever else runs, so rates say nothing unless a test makes them.
        flight = Preflight(seat.config, seconds, slow_below=0.02)
        flight.meet()
        with process_group(seat.config):
            flight.measure()
    except Faulty:
        pass
    except (ValueError, OSError) as caught:
        error = str(caught)
    except Exception:
        error = traceback.format_exc()
    if flight is not None:
        flight.part()
    answer.send_bytes(pickle.dumps(Came(flight.report.faults if flight else [], error, flight and flight.report)))


def fly(
    seats: Sequence[Seat | None], seconds: float = 20.0, port: int | None = None, master: str | None = None
) -> list[Came | None]:
    """How each rank's preflight ended; None for a seat without one, whose rank does not come.

    Args:
        seconds: that they wait for each other.
        port: of the store.
        master: address of rank 0; None: an outside one where there are several nodes.
    """
    hosts = [seat.host if seat else None for seat in seats]
    if master is None:
        master = outside_interface()[1] if len(set(hosts)) > 1 else "127.0.0.1"
    server, port = context(), port or free_port()
    waiting = []
    for rank, seat in enumerate(seats):
        if seat is None:
            waiting.append(None)
            continue
        mine = [other for other in range(len(seats)) if hosts[other] == hosts[rank]]
        environment = {
            "RANK": str(rank), "WORLD_SIZE": str(len(seats)), "LOCAL_RANK": str(mine.index(rank)),
            "LOCAL_WORLD_SIZE": str(len(mine)), "MASTER_ADDR": master, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        receiver, sender = server.Pipe(duplex=False)
        process = server.Process(target=_fly, args=(sender, seat, environment, seconds))
        process.start()
        sender.close()
        waiting.append((receiver, process))
    came: list[Came | None] = []
    try:
        for entry in waiting:
            if entry is not None and not entry[0].poll(TIMEOUT):
                pytest.fail(f"a rank has not ended its preflight within {TIMEOUT} s")
            came.append(None if entry is None else pickle.loads(entry[0].recv_bytes()))
    finally:
        for entry in waiting:
            if entry is not None:
                entry[1].join(10)
                if entry[1].is_alive():
                    entry[1].kill()
    return came
