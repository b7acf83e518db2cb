"""Who is still there: when a collective fails, the ranks that live find out which ones do not.

A rank whose peer died sees only that a connection closed. Every rank therefore keeps a thread that answers a roll call
through the process group's store, also while the rank itself waits in a collective.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from datetime import timedelta

import torch.distributed as dist

CALLED, GONE = "megakor/roll_call", "megakor/gone"
POLL_SECONDS, LISTEN_SECONDS = 0.05, 0.5
LINGER_SECONDS = 1.5  # for the others to read the result before the store goes with this process


def connect_store(seconds: float = 10.0) -> dist.TCPStore:
    """A client of the group's store, for one thread: rank 0's process, or the launcher's agent, keeps it.

    RuntimeError when it does not answer in so many seconds.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, timeout=timedelta(seconds=seconds))


class RollCall:
    """This rank's part in roll calls; every rank of a group makes one, when the group has started."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.gone: list[int] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._answer, args=(connect_store(),), daemon=True, name="roll call")
        self.thread.start()

    def close(self) -> None:
        """End the thread, before the process ends; every rank calls, when all are done."""
        self.over.set()
        self.thread.join()

    def _answer(self, store: dist.TCPStore) -> None:
        try:
            answered = False
            while not self.over.wait(LISTEN_SECONDS):
                if not answered and store.check([CALLED]):
                    store.set(f"{CALLED}/{self.rank}", "here")
                    answered = True
                if answered and store.check([GONE]):
                    self.gone = json.loads(store.get(GONE))
                    return
        except RuntimeError:
            return  # the store has gone, and with it whoever could call

    def missing(self, seconds: float = 2.0) -> list[int]:
        """The ranks that do not answer within so many seconds; any rank calls, and the first call's result holds.

        A launcher that has noticed a death ends the others by SIGTERM; this rank first says who died.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not self.gone:
            try:
                self.gone = self._call(connect_store(seconds), time.monotonic() + seconds)
            except RuntimeError:
                return self.gone or [0]  # the store went with the process that kept it
        return self.gone

    def _call(self, store: dist.TCPStore, deadline: float) -> list[int]:
        store.set(CALLED, "who is there?")
        waiting = set(range(self.world_size)) - {self.rank}
        while waiting and time.monotonic() < deadline and not store.check([GONE]):
            waiting -= {rank for rank in waiting if store.check([f"{CALLED}/{rank}"])}
            time.sleep(POLL_SECONDS)
        gone = json.loads(store.compare_set(GONE, "", json.dumps(sorted(waiting))))
        time.sleep(LINGER_SECONDS)
        return gone
