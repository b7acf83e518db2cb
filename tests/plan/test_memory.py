"""Memory of a rank by hand: what ZeRO leaves of it, what it never cuts, and what adapters save."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megakor.config.schema import OptimizerName, Precision, SimulateConfig
from megakor.parallel.dims import ParallelDims
from megakor.plan.activations import activations
from megakor.plan.memory import GIB, LIBRARIES, StageMemory, stage_memory, state_bytes
from megakor.plan.partition import Stage, layers_of, partition
from megakor.plan.work import LINEARS, Adapters
from tests.plan.layouts import layout, recomputed, sized

REPLICAS = 4


def stages(config: SimulateConfig, replicas: int = REPLICAS) -> tuple[ParallelDims, list[Stage]]:
    parallel = config.parallel
    others = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    dims = ParallelDims.from_config(parallel, replicas * others)
    return dims, partition(layers_of(config.model), "parameters", dims.pipeline, dims.tensor)


def memory(changes: dict[str, Any], **options: Any) -> list[StageMemory]:
    config = layout(changes)
    dims, cut = stages(config)
    return [stage_memory(config, config.model, dims, stage, **options) for stage in cut]


@pytest.mark.parametrize(
    ("stage", "precision", "per_parameter"),
    [
        (0, Precision.fp32, (4, 4, 8)),
        (1, Precision.bf16, (2, 4, 12 / REPLICAS)),
        (1, Precision.fp32, (4, 4, 12 / REPLICAS)),
        (2, Precision.bf16, (2, 4 / REPLICAS, 12 / REPLICAS)),
        (3, Precision.bf16, (2 / REPLICAS, 4 / REPLICAS, 12 / REPLICAS)),
    ],
)
def test_bytes_a_parameter(stage: int, precision: Precision, per_parameter: tuple[float, ...]) -> None:
    """Rajbhandari et al. 2020, figure 1, but with gradients in fp32."""
    config = layout({"parallel__zero_stage": stage, "train__precision": precision})
    dims, _ = stages(config)
    numel = 1_000_000
    assert state_bytes(config, dims, numel) == tuple(numel * size for size in per_parameter)


def test_offloading_and_adafactor_take_state_away() -> None:
    changes = {"parallel__zero_stage": 3, "parallel__offload_optimizer": True, "parallel__offload_parameters": True}
    config = layout(changes)
    dims, _ = stages(config)
    assert state_bytes(config, dims, 1000) == (0, 1000, 0)
    config = layout({})
    config.optimizer.name = OptimizerName.adafactor
    assert state_bytes(config, dims, 1000)[2] == 1000  # the masters' part alone


def test_the_parts_add_up_and_stages_keep_fewer_micro_batches() -> None:
    changes = sized(pipeline=4, tensor=2) | {"train__global_batch_size": 64}
    found = memory(changes)
    assert [stage.in_flight for stage in found] == [4, 3, 2, 1]
    for stage in found:
        assert stage.total == sum(stage.parts.values())
        assert stage.margin > LIBRARIES
    config = layout(changes)
    dims, cut = stages(config)
    one = [activations(config, config.model, dims, stage) for stage in cut]
    assert found[1].activations == 2 * one[1].kept + one[1].peak - one[1].buffers
    assert found[1].buffers == one[1].buffers == 2 * 2 * 1024 * 1024 * 2
    assert found[3].logits == one[3].logits > 0


def test_a_step_of_one_micro_batch_keeps_one() -> None:
    assert {stage.in_flight for stage in memory(sized(pipeline=4) | {"train__global_batch_size": 8})} == {1}


def test_moments() -> None:
    """Where activations are small, the update of many parameters or piled up gradients are the fullest moment."""
    small = {"train__micro_batch_size": 1, "train__sequence_length": 16, "train__global_batch_size": 8}
    assert [stage.moment for stage in memory({})] == ["backward"]
    assert [stage.moment for stage in memory(small | {"parallel__zero_stage": 2})] == ["embedding"]
    config = layout(small | {"train__precision": Precision.fp32})
    dims, (stage,) = stages(config, replicas=1)
    found = stage_memory(config, config.model, dims, stage)
    assert (found.moment, found.gradients) == ("update", 8 * found.parameters)


def test_buckets_are_deepspeeds() -> None:
    """A pass-through key sets them; in ZeRO-1 in bf16 there are none."""
    assert memory({})[0].buffers == 0
    two = layout({"parallel__zero_stage": 2})
    dims, (stage,) = stages(two)
    assert stage_memory(two, two.model, dims, stage).buffers == 2 * 500_000_000
    two.deepspeed = {"zero_optimization": {"reduce_bucket_size": 1000}}
    assert stage_memory(two, two.model, dims, stage).buffers == 2 * 1000
    three = layout({"parallel__zero_stage": 3})
    three.deepspeed = {"zero_optimization": {"reduce_bucket_size": 1000, "stage3_max_live_parameters": 30_000_000}}
    assert stage_memory(three, three.model, dims, stage).buffers == 2 * 1000 + 2 * 30_000_000
    assert stage_memory(three, three.model, dims, stage, on_host=True).buffers == 2 * 30_000_000


def test_what_saves_memory_does() -> None:
    kinds = [memory(recomputed(kind))[0].activations for kind in ("none", "selective", "full")]
    assert kinds == sorted(kinds, reverse=True)
    whole, split = (memory(sized(tensor=4) | more)[0] for more in ({}, {"parallel__sequence_parallel": True}))
    assert split.activations < 0.8 * whole.activations
    assert split.weights == whole.weights


def test_adapters_by_hand() -> None:
    config = layout({})
    dims, (stage,) = stages(config)
    hidden, layers, rank = 1024, 5, 8
    adapters = Adapters(rank, ("query_key_value",))
    found = stage_memory(config, config.model, dims, stage, adapters)
    trained = layers * rank * (hidden + 3 * hidden)
    assert found.parameters == stage.parameters + trained
    assert found.weights == 2 * found.parameters
    assert found.optimizer == 12 * trained // REPLICAS
    assert found.gradients < 0.01 * memory({})[0].gradients
    tokens = 2 * 1024
    states, inner = tokens * hidden * 2, tokens * 4096 * 2
    kept = [activations(config, config.model, dims, stage, which).kept for which in (None, adapters)]
    # The second norm's output, the inputs of the attention's and the feed-forward's output projections, and the head's.
    assert kept[0] - kept[1] == layers * (2 * states + inner - tokens * rank * 2) + states
    everywhere = activations(config, config.model, dims, stage, Adapters(rank, LINEARS)).kept
    assert everywhere == kept[0] + layers * 4 * tokens * rank * 2 - states


def test_the_library_margin_is_an_argument() -> None:
    without = memory({}, libraries=0.0)[0]
    assert memory({})[0].total - without.total == LIBRARIES
    assert memory({}, on_host=True, libraries=0.0)[0].margin == 0
    assert GIB == 2**30
    assert replace(without, margin=0).total < without.total
