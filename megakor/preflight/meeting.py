"""Ranks meet at a store, with or without a process group: each tells, rank 0 collects and answers.

Nothing here waits without end: who does not tell in time is left out of what rank 0 gets, and rank 0 says so.
A gathering is one message of each rank, one read of them all, and a look every `POLL_SECONDS` until they are there; an
answer is one message of rank 0 and one read of each other rank.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megakor.preflight.addresses import reachable_by_others
from megakor.train.device import local_world_size, take_place

POLL_SECONDS = 0.05
ANSWER_SECONDS = 60.0
"""The longest that rank 0 may take between what it hears and what it answers."""
PART_SECONDS = 5.0
"""How long rank 0, whose process may keep the store, waits for the others to have read the last answer."""


class Meeting:
    """This rank's seat. Every rank makes one; keep it until `part`: rank 0's may hold the store.

    Args:
        store: that all ranks reach.
        rank: of this process.
        world_size: ranks that are to come.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's agent keeps its store over restarts
        self.store = dist.PrefixStore(f"megakor/preflight/{attempt}", store)
        self.rank, self.world_size = rank, world_size

    @classmethod
    def open(cls, seconds: float) -> Meeting:
        """Meet where the launcher says, MASTER_ADDR and MASTER_PORT; without a launcher, alone.

        Raises:
            OSError: rank 0 cannot listen there, does not answer within so many seconds, or no other node can reach it.
        """
        if take_place():
            return cls(dist.HashStore(), 0, 1)
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        check_address(address, rank)
        if not serves:
            wait_for(address, port, seconds)
        timeout = timedelta(seconds=ANSWER_SECONDS)
        try:
            # The process group's store will be a second tenant of this one's server.
            store = dist.TCPStore(address, port, None, serves, timeout, wait_for_workers=False, multi_tenant=True)
        except RuntimeError as error:
            rule = "be free on the first node, where rank 0 listens" if serves else "be a store that rank 0 keeps"
            why = str(error).splitlines()[0]
            raise OSError(f"MASTER_PORT={port} (cluster.master_port) must {rule}: {why}") from error
        return cls(store, rank, world_size)

    def gather(self, topic: str, value: Any, seconds: float, ranks: Sequence[int] | None = None) -> dict[int, Any]:
        """Tell rank 0; there, what each rank told, without those that did not within so many seconds. Else empty.

        Args:
            ranks: that call; None: all.
        """
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))
        if self.rank:
            return {}
        keys = [f"{topic}/{rank}" for rank in (range(self.world_size) if ranks is None else ranks)]
        deadline = time.monotonic() + seconds
        while not self.store.check(keys) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        there = keys if self.store.check(keys) else [key for key in keys if self.store.check([key])]
        told = self.store.multi_get(there)
        return {int(key.rpartition("/")[2]): json.loads(words) for key, words in zip(there, told, strict=True)}

    def answer(self, topic: str, value: Any = None, seconds: float = ANSWER_SECONDS) -> Any:
        """Rank 0's value, on every rank.

        Raises:
            OSError: it does not come within so many seconds.
        """
        if self.rank == 0:
            self.store.set(topic, json.dumps(value))
            return value
        return self.hear(topic, 0, seconds)

    def hear(self, topic: str, rank: int, seconds: float = ANSWER_SECONDS) -> Any:
        """What a rank has set under a topic.

        Raises:
            OSError: it does not come within so many seconds, or the store has gone.
        """
        try:
            self.store.wait([topic], timedelta(seconds=seconds))
            return json.loads(self.store.get(topic))
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise OSError(f"preflight: rank {rank} must tell {topic} within {seconds:.0f} s: {why}") from error

    def part(self, there: Sequence[int]) -> None:
        """End together: nobody before rank 0 calls, and rank 0 last of `there`, the ranks that have come."""
        self.answer("over")
        self.store.set(f"parted/{self.rank}", "")
        deadline = time.monotonic() + PART_SECONDS
        keys = [f"parted/{rank}" for rank in there]
        while self.rank == 0 and time.monotonic() < deadline and not self.store.check(keys):
            time.sleep(POLL_SECONDS)


def check_address(address: str, rank: int) -> None:
    """OSError where a rank of another node than rank 0's would look for rank 0 on its own."""
    try:
        found = [str(place[4][0]) for place in socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)]
    except socket.gaierror as error:
        raise OSError(
            f"rank {rank} on {socket.gethostname()}: MASTER_ADDR={address} (cluster.master_address) must be an address "
            f"or a name that has one: {error.strerror}"
        ) from error
    if rank >= local_world_size() and not reachable_by_others(found[0]):
        raise OSError(
            f"rank {rank} on {socket.gethostname()}: MASTER_ADDR={address} (cluster.master_address) must be an address "
            f"of rank 0's node that other nodes reach; it is {found[0]}"
        )


def wait_for(address: str, port: int, seconds: float) -> None:
    """Return when somebody listens there; OSError when nobody does within so many seconds."""
    deadline, host = time.monotonic() + seconds, socket.gethostname()
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((address, port), timeout=max(0.1, left)).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise OSError(
                    f"rank {os.environ['RANK']} on {host}: MASTER_ADDR={address}, MASTER_PORT={port} "
                    f"(cluster.master_address, cluster.master_port) must answer within {seconds:.0f} s: {error}"
                ) from error
        time.sleep(4 * POLL_SECONDS)
