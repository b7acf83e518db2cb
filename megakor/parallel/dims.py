"""`ParallelDims`: how the ranks of a run are laid out. Frozen, validated, passed explicitly.

Ranks are numbered pipeline-major, then data, then context, then tensor, so that tensor peers are neighbours:
rank = ((pipeline · data + d) · context + c) · tensor + t.
"""

from __future__ import annotations

from dataclasses import dataclass

from megakor.config.schema import ParallelConfig


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of every axis; their product is the number of ranks."""

    pipeline: int
    data: int
    context: int
    tensor: int

    @classmethod
    def from_config(cls, config: ParallelConfig, world_size: int) -> ParallelDims:
        """The layout of `world_size` ranks.

        Raises:
            ValueError: the sizes do not multiply to `world_size`.
        """
        others = config.tensor_parallel_size * config.pipeline_parallel_size * config.context_parallel_size
        data = config.data_parallel_size
        if data is None:
            if world_size % others:
                raise ValueError(
                    f"parallel.tensor_parallel_size={config.tensor_parallel_size} × "
                    f"pipeline_parallel_size={config.pipeline_parallel_size} × "
                    f"context_parallel_size={config.context_parallel_size} must divide the number of processes, "
                    f"{world_size}"
                )
            data = world_size // others
        elif data * others != world_size:
            raise ValueError(
                f"parallel.data_parallel_size={data} times the other sizes, {others}, must equal the number of "
                f"processes, {world_size}"
            )
        return cls(
            pipeline=config.pipeline_parallel_size,
            data=data,
            context=config.context_parallel_size,
            tensor=config.tensor_parallel_size,
        )

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.context * self.tensor

    def data_rank(self, rank: int) -> int:
        """Position of `rank` on the data axis."""
        return rank // (self.context * self.tensor) % self.data

    def pipeline_rank(self, rank: int) -> int:
        """The stage that `rank` holds."""
        return rank // (self.data * self.context * self.tensor)
