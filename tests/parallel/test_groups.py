"""The process groups of a layout are those that DeepSpeed makes from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid

from megakor.parallel.dims import AXES, ParallelDims
from megakor.parallel.groups import Groups, ModelParallelUnit, pipeline_topology
from tests.ranks import run_ranks

LAYOUTS = [
    ParallelDims(pipeline=2, data=2, context=1, tensor=2),
    ParallelDims(pipeline=4, data=1, context=1, tensor=2),
    ParallelDims(pipeline=1, data=4, context=1, tensor=2),
    ParallelDims(pipeline=1, data=1, context=1, tensor=8),
    ParallelDims(pipeline=8, data=1, context=1, tensor=1),
    ParallelDims(pipeline=1, data=8, context=1, tensor=1),
    ParallelDims(pipeline=1, data=2, context=2, tensor=2),
    ParallelDims(pipeline=1, data=2, context=4, tensor=1),
    ParallelDims(pipeline=1, data=1, context=2, tensor=4),
]


def ranks_of(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def of_ours(dims: ParallelDims) -> dict[str, Any]:
    groups = Groups.create(dims)
    mpu = ModelParallelUnit(groups)
    return {
        "positions": tuple(groups.position(axis) for axis in AXES),
        "tensor": ranks_of(groups.tensor),
        "context": ranks_of(groups.context),
        "replicas": ranks_of(groups.replicas),
        "mpu": {
            "tensor": ranks_of(mpu.get_tensor_model_parallel_group()),
            "tensor rank": mpu.get_tensor_model_parallel_rank(),
            "tensor size": mpu.get_tensor_model_parallel_world_size(),
            "model": ranks_of(mpu.get_model_parallel_group()),
            "model rank": mpu.get_model_parallel_rank(),
            "model size": mpu.get_model_parallel_world_size(),
            "data": ranks_of(mpu.get_data_parallel_group()),
            "data ranks": mpu.get_data_parallel_group_ranks(),
            "data rank": mpu.get_data_parallel_rank(),
            "data size": mpu.get_data_parallel_world_size(),
        },
    }


def of_deepspeed(dims: ParallelDims) -> dict[str, Any]:
    """The grid of DeepSpeed's pipeline engine, which serves as its own `mpu`."""
    grid = PipelineParallelGrid(pipeline_topology(dims))
    return {
        "tensor": ranks_of(grid.get_slice_parallel_group()),
        "tensor rank": grid.get_tensor_model_parallel_rank(),
        "tensor size": grid.get_tensor_model_parallel_world_size(),
        "model": ranks_of(grid.get_model_parallel_group()),
        "model rank": grid.get_model_parallel_rank(),
        "model size": grid.get_model_parallel_world_size(),
        "data": ranks_of(grid.get_data_parallel_group()),
        "data ranks": list(grid.get_data_parallel_group_ranks()),
        "data rank": grid.get_data_parallel_rank(),
        "data size": grid.get_data_parallel_world_size(),
        "stage": grid.get_stage_id(),
    }


def run_layouts() -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    return [(of_ours(dims), of_deepspeed(dims) if dims.context == 1 else None) for dims in LAYOUTS]


@pytest.fixture(scope="module")
def ranks() -> list[list[tuple[dict[str, Any], dict[str, Any] | None]]]:
    return run_ranks(run_layouts, 8)


def name(dims: ParallelDims) -> str:
    return " ".join(f"{axis}{getattr(dims, axis)}" for axis in AXES)


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=[name(dims) for dims in LAYOUTS])
def test_groups_of_eight_ranks(ranks: list, index: int) -> None:
    dims = LAYOUTS[index]
    numbers = np.arange(8).reshape(dims.pipeline, dims.data, dims.context, dims.tensor)
    for rank in range(8):
        ours, theirs = ranks[rank][index]
        stage, data, context, tensor = (int(position[0]) for position in np.nonzero(numbers == rank))
        assert ours["positions"] == (stage, data, context, tensor)
        assert ours["tensor"] == numbers[stage, data, context].tolist()
        assert ours["context"] == numbers[stage, data, :, tensor].tolist()
        assert ours["replicas"] == numbers[stage, :, :, tensor].flatten().tolist()
        if theirs is not None:
            assert (ours["tensor"], ours["replicas"]) == (theirs["tensor"], theirs["data"])
            assert theirs.pop("stage") == stage
            if dims.pipeline == 1:  # the plain engine's
                assert ours["mpu"] == theirs
        else:  # ranks that split sequences are replicas for DeepSpeed
            assert ours["mpu"]["data ranks"] == ours["mpu"]["data"] == ours["replicas"]
            assert ours["mpu"]["data rank"] == data * dims.context + context
            assert ours["mpu"]["data size"] == dims.data * dims.context
            assert ours["mpu"]["model"] == ours["mpu"]["tensor"] == ours["tensor"]
            assert ours["mpu"]["model rank"] == tensor
            assert ours["mpu"]["model size"] == dims.tensor


def test_a_pipeline_has_whole_sequences() -> None:
    with pytest.raises(AssertionError, match="whole sequences"):
        pipeline_topology(ParallelDims(pipeline=1, data=1, context=2, tensor=1))


def groups_after_others() -> list[list[int]]:
    """The groups of two layouts, made after groups that only some of the ranks are in."""
    if dist.get_rank() in (0, 3):
        dist.new_group([dist.get_rank()], use_local_synchronization=True)
    made = [Groups.create(ParallelDims(2, 1, 1, 2)), Groups.create(ParallelDims(1, 2, 1, 2))]
    for groups in made:
        for group in (groups.tensor, groups.context, groups.replicas):
            dist.barrier(group)
    return [ranks_of(group) for groups in made for group in (groups.tensor, groups.replicas)]


def test_groups_do_not_depend_on_those_made_before() -> None:
    found = run_ranks(groups_after_others, 4)
    assert found[0] == [[0, 1], [0], [0, 1], [0, 2]]
    assert found[3] == [[2, 3], [3], [2, 3], [1, 3]]
