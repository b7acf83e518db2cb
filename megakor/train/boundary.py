"""What ranks tell each other between two steps, so that all of them stop, save and settle at the same one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


class Boundary:
    """The meeting of all ranks after each step; every rank makes one, at the same time.

    It meets on the host: a few numbers from each rank, which wait for no accelerator. What ranks must do together is
    decided from what all of them have heard, never from what one has seen.
    """

    def __init__(self) -> None:
        on_host = dist.get_backend() in ("gloo", "fake")
        self._group = dist.group.WORLD if on_host else dist.new_group(backend="gloo")

    def meet(self, numbers: Sequence[float]) -> list[list[float]]:
        """Everyone's numbers, by rank; as many from each. Every rank calls."""
        own = torch.tensor(numbers, dtype=torch.float64)
        everyone = torch.empty(dist.get_world_size() * len(numbers), dtype=torch.float64)
        dist.all_gather_into_tensor(everyone, own, group=self._group)
        return everyone.view(-1, len(numbers)).tolist()
