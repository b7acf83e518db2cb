"""`ParallelDims`: how the ranks of a run are laid out. Frozen, validated, passed explicitly.

Ranks are numbered pipeline-major, then data, then context, then tensor, so that tensor peers are neighbours:
rank = ((pipeline · data + d) · context + c) · tensor + t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megakor.config.schema import ParallelConfig, TrainConfig

AXES = ("pipeline", "data", "context", "tensor")
"""Outermost first."""


def smallest_world_size(parallel: ParallelConfig) -> int:
    """The number of processes that a layout's sizes multiply to; an open data_parallel_size counts as 1."""
    sizes = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.context_parallel_size
    return math.prod(sizes) * (parallel.data_parallel_size or 1)


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of every axis; their product is the number of ranks.

    Attributes:
        sequence_parallel: whether tensor ranks split the residual stream along the sequence.
    """

    pipeline: int
    data: int
    context: int
    tensor: int
    sequence_parallel: bool = False

    @classmethod
    def from_config(cls, config: ParallelConfig, world_size: int) -> ParallelDims:
        """The layout of `world_size` ranks.

        Raises:
            ValueError: the sizes do not multiply to `world_size`; the error names the nearest sizes that do.
        """
        others = config.tensor_parallel_size * config.pipeline_parallel_size * config.context_parallel_size
        data = config.data_parallel_size
        sizes = (
            f"parallel.tensor_parallel_size={config.tensor_parallel_size} × "
            f"pipeline_parallel_size={config.pipeline_parallel_size} × "
            f"context_parallel_size={config.context_parallel_size}"
        )
        if world_size % others:
            fewer, more = world_size // others * others, -(-world_size // others) * others
            nearest = " or ".join(str(count) for count in (fewer, more) if count)
            raise ValueError(
                f"{sizes} = {others} must divide the number of processes, {world_size}; nearest: {nearest} processes"
            )
        if data is not None and data * others != world_size:
            raise ValueError(
                f"parallel.data_parallel_size={data} times the other sizes, {others}, must equal the number of "
                f"processes, {world_size}; nearest: parallel.data_parallel_size={world_size // others}"
            )
        return cls(
            pipeline=config.pipeline_parallel_size,
            data=world_size // others,
            context=config.context_parallel_size,
            tensor=config.tensor_parallel_size,
            sequence_parallel=config.sequence_parallel,
        )

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters and sum their gradients: data × context."""
        return self.data * self.context

    def num_micro_batches(self, train: TrainConfig) -> int:
        """Of a rank in a step of the global batch size; where they do not divide it, empty rows fill them up."""
        return -(-train.global_batch_size // (train.micro_batch_size * self.data))

    def coordinate(self, rank: int, axis: str) -> int:
        """Position of `rank` on an axis."""
        inner = math.prod(getattr(self, name) for name in AXES[AXES.index(axis) + 1 :])
        return rank // inner % getattr(self, axis)

    def data_rank(self, rank: int) -> int:
        """Position of `rank` on the data axis."""
        return self.coordinate(rank, "data")

    def pipeline_rank(self, rank: int) -> int:
        """The stage that `rank` holds."""
        return self.coordinate(rank, "pipeline")

    def groups(self, *axes: str) -> list[list[int]]:
        """The ranks in groups: ranks of a group differ in their positions on `axes` alone; ascending."""
        found: dict[Any, list[int]] = {}
        for rank in range(self.world_size):
            rest = tuple(self.coordinate(rank, axis) for axis in AXES if axis not in axes)
            found.setdefault(rest, []).append(rank)
        return list(found.values())

    def peers(self, rank: int, *axes: str) -> list[int]:
        """The group of `groups(*axes)` that a rank is in."""
        return next(group for group in self.groups(*axes) if rank in group)
