from __future__ import annotations

import math

import pytest
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from hypothesis import given, settings
from hypothesis import strategies as st

from megakor.config.schema import ParallelConfig
from megakor.parallel.dims import AXES, ParallelDims


def test_the_data_axis_takes_what_is_left() -> None:
    dims = ParallelDims.from_config(ParallelConfig(pipeline_parallel_size=2), 8)
    assert (dims.pipeline, dims.data, dims.context, dims.tensor, dims.world_size) == (2, 4, 1, 1, 8)


@pytest.mark.parametrize(
    ("config", "world_size", "words"),
    [
        (
            ParallelConfig(pipeline_parallel_size=2),
            3,
            ["pipeline_parallel_size=2", "divide the number of processes, 3"],
        ),
        (ParallelConfig(pipeline_parallel_size=4), 2, ["pipeline_parallel_size=4", "2"]),
        (ParallelConfig(data_parallel_size=3), 2, ["parallel.data_parallel_size=3", "must equal", "2"]),
        (
            ParallelConfig(data_parallel_size=2, pipeline_parallel_size=2),
            2,
            ["parallel.data_parallel_size=2", "other sizes, 2"],
        ),
    ],
)
def test_sizes_that_do_not_fit(config: ParallelConfig, world_size: int, words: list[str]) -> None:
    with pytest.raises(ValueError, match="must") as raised:
        ParallelDims.from_config(config, world_size)
    for word in words:
        assert word in str(raised.value)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_ranks_lie_as_deepspeeds_topology_has_them(pipeline: int, data: int, tensor: int) -> None:
    dims = ParallelDims(pipeline=pipeline, data=data, context=1, tensor=tensor)
    topology = PipeModelDataParallelTopology(num_pp=pipeline, num_dp=data, num_mp=tensor)
    assert topology.world_size() == dims.world_size
    for rank in range(dims.world_size):
        coordinates = topology.get_coord(rank)
        assert (dims.pipeline_rank(rank), dims.data_rank(rank)) == (coordinates.pipe, coordinates.data)


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_ranks_are_numbered_pipeline_major(pipeline: int, data: int, context: int, tensor: int) -> None:
    dims = ParallelDims(pipeline, data, context, tensor)
    expected = [(p, d) for p in range(pipeline) for d in range(data) for _ in range(context * tensor)]
    assert [(dims.pipeline_rank(rank), dims.data_rank(rank)) for rank in range(dims.world_size)] == expected


SIZES = st.integers(1, 4)


@settings(max_examples=30, deadline=None)
@given(SIZES, SIZES, SIZES)
def test_groups_are_those_of_deepspeeds_topology(pipeline: int, data: int, tensor: int) -> None:
    dims = ParallelDims(pipeline=pipeline, data=data, context=1, tensor=tensor)
    topology = PipeModelDataParallelTopology(num_pp=pipeline, num_dp=data, num_mp=tensor)
    assert dims.groups("tensor") == topology.get_axis_comm_lists("model")
    assert sorted(dims.groups("data")) == sorted(topology.get_axis_comm_lists("data"))
    assert dims.groups("data", "context") == dims.groups("data")
    assert sorted(dims.groups("pipeline")) == sorted(topology.get_axis_comm_lists("pipe"))
    for rank in range(dims.world_size):
        assert dims.coordinate(rank, "tensor") == topology.get_coord(rank).model


@settings(max_examples=50, deadline=None)
@given(SIZES, SIZES, SIZES, SIZES, st.sets(st.sampled_from(AXES), min_size=1))
def test_every_rank_is_in_one_group(pipeline: int, data: int, context: int, tensor: int, axes: set[str]) -> None:
    dims = ParallelDims(pipeline, data, context, tensor)
    groups = dims.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(dims.world_size))
    assert {len(group) for group in groups} == {math.prod(getattr(dims, axis) for axis in axes)}
    for group in groups:
        assert group == sorted(group)
        assert all(dims.peers(rank, *axes) == group for rank in group)
        for axis in AXES:
            positions = {dims.coordinate(rank, axis) for rank in group}
            assert positions == set(range(getattr(dims, axis))) if axis in axes else len(positions) == 1
    assert dims.replicas == len(dims.groups("data", "context")[0])
