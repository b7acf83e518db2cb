"""Errors that all ranks share: what goes wrong on one is raised on every one, so that none waits for a rank that left.

Every rank calls what is here, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def on_first_rank(work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 and return its result, or raise its `ValueError` or `OSError`, on every rank."""
    outcome: list[tuple[Result | None, ValueError | OSError | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(work(), None)]
        except (ValueError, OSError) as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def raise_together(error: Exception | None, doing: str, consequence: str) -> None:
    """Raise `OSError` on every rank if any has an error.

    Its text names what was being done, the first rank that failed, its error, and what follows from it.
    """
    told = first_told(None if error is None else f"{type(error).__name__}: {error}")
    if told is not None:
        rank, text = told
        raise OSError(f"{doing}: rank {rank}: {text}; {consequence}") from error


def first_told(text: str | None) -> tuple[int, str] | None:
    """The first rank that has something to tell, and what; None when none has. The same on every rank."""
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, text)
    return next(((rank, words) for rank, words in enumerate(everyone) if words is not None), None)
