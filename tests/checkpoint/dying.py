"""A process that dies by SIGKILL at a chosen operation on files."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

FILE_EVENTS = ("open", "os.", "shutil.")


@contextmanager
def group() -> Iterator[None]:
    """A process group of this process alone; none is left that a fork would inherit."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def die_at(last: int, before: Callable[[], None], work: Callable[[], None]) -> int:
    """In a process of its own: `before`, then `work`, with death by SIGKILL at operation `last` of the latter.

    Returns how many operations on files there were, if that was none of them.
    """
    answer, child = os.pipe(), os.fork()
    if child:
        os.close(answer[1])
        _, status = os.waitpid(child, 0)
        told = os.read(answer[0], 20)
        os.close(answer[0])
        assert os.WIFSIGNALED(status) or told, status
        return int(told or 0)
    try:
        count = 0

        def hook(event: str, _: tuple) -> None:
            nonlocal count
            if event.startswith(FILE_EVENTS):
                count += 1
                if count == last + 1:
                    os.kill(os.getpid(), signal.SIGKILL)  # an event itself

        with group():
            before()
            sys.addaudithook(hook)
            work()
        os.write(answer[1], str(count).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
