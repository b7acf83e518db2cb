"""Runs a function on several ranks of a gloo group, each a process of its own.

The processes are forked from a server that has DeepSpeed imported already, so a group starts in a fraction of a second.
"""

from __future__ import annotations

import functools
import gc
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PRELOADED = "tests.preloaded"

LOWEST_PORT, STRIPE, NUM_STRIPES = 20_000, 1_500, 8
"""Ports of test runs, below those that the kernel gives to connections."""


@functools.cache
def ports(pid: int) -> Iterator[int]:
    """A stripe of them without end: a worker's own, or one that the process's number chooses.

    A port is found free some time before a rank listens on it, so two runs must not try the same ones.
    """
    worker, half = os.environ.get("PYTEST_XDIST_WORKER"), NUM_STRIPES // 2
    stripe = int(worker.removeprefix("gw")) % half if worker else half + pid % half
    first = LOWEST_PORT + STRIPE * stripe
    return itertools.cycle(first + (pid + number) % STRIPE for number in range(STRIPE))


def free_port() -> int:
    """A port that nobody listens on."""
    for port in ports(os.getpid()):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("the ports have no end")


@functools.cache
def context() -> multiprocessing.context.BaseContext:
    os.environ["OMP_NUM_THREADS"] = "1"  # read by libgomp when the server starts
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([PRELOADED])
    with pytest.MonkeyPatch.context() as patch:  # a test may have left the folder that the module is found from
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        multiprocessing.forkserver.ensure_running()
    return server


def _rank(
    answer: multiprocessing.connection.Connection,
    function: Callable,
    rank: int,
    world_size: int,
    port: int,
    args: tuple,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    assert PRELOADED in sys.modules, "the server could not import it"
    import torch

    from megakor.train.device import end_process_group, start_process_group

    torch.set_num_threads(1)
    gc.freeze()  # as the mains do: DeepSpeed collects six times for every engine, and would walk what is here
    try:
        start_process_group(timeout_minutes=2)
        result = function(*args)
        end_process_group()
        answer.send_bytes(pickle.dumps((True, result)))  # plainly: torch's own pickling would share file descriptors
    except BaseException:
        answer.send_bytes(pickle.dumps((False, traceback.format_exc())))


def run_ranks(
    function: Callable, world_size: int, *args: Any, timeout: float = 150.0, killed: bool = False
) -> list[Any]:
    """What `function(*args)` returned on each rank of a fresh group.

    Args:
        function: of a module that the processes can import.
        killed: the function ends in SIGKILL on one rank; the others are killed then, as a launcher does.
    """
    server, port = context(), free_port()
    pipes = [server.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        server.Process(target=_rank, args=(pipe[1], function, rank, world_size, port, args))
        for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    waiting = {receiver: rank for rank, (receiver, _) in enumerate(pipes)}
    results: list[Any] = [None] * world_size
    deadline, died = time.monotonic() + timeout, []
    try:
        while waiting and not died:
            ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                pytest.fail(f"{function.__name__}: ranks {sorted(waiting.values())} did not answer in {timeout} s")
            for receiver in ready:
                rank = waiting.pop(receiver)
                try:
                    fine, results[rank] = pickle.loads(receiver.recv_bytes())
                except EOFError:
                    died.append(rank)
                    continue
                if not fine:
                    time.sleep(0.2)
                    pytest.fail(f"{function.__name__}: rank {rank}:\n{results[rank]}")
    finally:
        for process in processes:
            if process.is_alive() and (waiting or died):
                process.kill()
            process.join(30)
    if bool(died) != killed:
        pytest.fail(f"{function.__name__}: ranks {died} died, {'one' if killed else 'none'} should have")
    return results
