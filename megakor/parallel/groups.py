"""The process groups of a layout, and the two forms in which DeepSpeed wants to know the layout.

The plain engine takes an `mpu`; the pipeline engine takes a topology and makes the same groups from it itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from megakor.parallel.dims import ParallelDims


@dataclass(frozen=True)
class Groups:
    """This rank's process groups.

    Attributes:
        dims: the layout.
        rank: this rank.
        tensor: ranks that split each layer.
        context: ranks that split each sequence.
        replicas: ranks that hold the same parameters: data × context.
    """

    dims: ParallelDims
    rank: int
    tensor: dist.ProcessGroup
    context: dist.ProcessGroup
    replicas: dist.ProcessGroup

    @classmethod
    def create(cls, dims: ParallelDims) -> Groups:
        """Make the groups; every rank of the process group calls.

        All ranks make all groups, in the same order. PyTorch could make a rank only its own, but would name them by how
        many it has been in before, which would have to be the same on every rank. A group of one may have any name.
        """
        rank = dist.get_rank()

        def own(*axes: str) -> dist.ProcessGroup:
            if dims.peers(rank, *axes) == [rank]:
                return dist.new_group([rank], use_local_synchronization=True)
            group, _ = dist.new_subgroups_by_enumeration(dims.groups(*axes))
            return group

        return cls(dims, rank, own("tensor"), own("context"), own("data", "context"))

    def position(self, axis: str) -> int:
        """This rank's position on an axis."""
        return self.dims.coordinate(self.rank, axis)


def pipeline_topology(dims: ParallelDims) -> PipeModelDataParallelTopology:
    """The layout for DeepSpeed's pipeline engine, which knows no context axis."""
    assert dims.context == 1, "a pipeline has whole sequences"
    return PipeModelDataParallelTopology(num_pp=dims.pipeline, num_dp=dims.data, num_mp=dims.tensor)


class ModelParallelUnit:
    """The layout for DeepSpeed's plain engine: the methods of Megatron-LM's `mpu` that it calls.

    Context ranks are told as data ranks: they hold the same parameters, and ZeRO cuts over all of them.
    """

    def __init__(self, groups: Groups) -> None:
        self.groups = groups

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.groups.tensor

    def get_model_parallel_rank(self) -> int:
        return self.groups.position("tensor")

    def get_model_parallel_world_size(self) -> int:
        return self.groups.dims.tensor

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.groups.replicas

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.groups.replicas)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.groups.replicas)

    def get_data_parallel_world_size(self) -> int:
        return self.groups.dims.replicas
