"""The formulas against the model itself, run on fake tensors: activations, layers of stages, and what ranks say."""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from megakor.config.schema import Precision, SimulateConfig
from megakor.parallel.dims import ParallelDims, smallest_world_size
from megakor.plan.activations import Activations, activations
from megakor.plan.memory import state_bytes
from megakor.plan.partition import Stage, layers_of, partition
from megakor.plan.traffic import stage_traffic
from megakor.simulate.layout import Simulation, simulate
from tests.plan.layouts import LAYOUTS, WITH_DROPOUT, layout, sized

ALL = LAYOUTS | WITH_DROPOUT
REPLICAS = 2


def planned(config: SimulateConfig) -> tuple[ParallelDims, list[Stage]]:
    dims = ParallelDims.from_config(config.parallel, REPLICAS * smallest_world_size(config.parallel))
    stages = partition(layers_of(config.model), config.parallel.pipeline_partition, dims.pipeline, dims.tensor)
    return dims, stages


@functools.cache
def simulated(name: str) -> Simulation:
    config = layout(ALL[name])
    config.world_size = REPLICAS * smallest_world_size(config.parallel)
    return simulate(config)


def both(name: str) -> list[tuple[Activations, int, int]]:
    """Of each stage: the plan's activations; kept bytes and peak of the simulation."""
    config = layout(ALL[name])
    dims, stages = planned(config)
    found = []
    for stage, other in zip(stages, simulated(name).stages, strict=True):
        peak = other.activations - (other.in_flight - 1) * other.kept
        found.append((activations(config, config.model, dims, stage), other.kept, peak))
    return found


@pytest.mark.parametrize("name", ALL)
def test_what_is_kept_is_the_same_to_the_byte(name: str) -> None:
    assert [plan.kept for plan, _, _ in both(name)] == [kept for _, kept, _ in both(name)]


@pytest.mark.parametrize("name", ALL)
def test_peaks(name: str) -> None:
    tolerance = 0.08 if name in WITH_DROPOUT else 0.03
    assert [plan.peak for plan, _, _ in both(name)] == pytest.approx([peak for _, _, peak in both(name)], rel=tolerance)
    for plan, _, _ in both(name):
        assert 0 <= plan.logits <= plan.peak
        assert 0 <= plan.buffers <= plan.peak


@pytest.mark.parametrize("name", ALL)
def test_stages_hold_what_deepspeed_gives_them(name: str) -> None:
    stages = planned(layout(ALL[name]))[1]
    assert [stage.parameters for stage in stages] == [stage.parameters for stage in simulated(name).stages]
    if not layout(ALL[name]).model.tie_word_embeddings:
        assert [stage.holds for stage in stages] == [stage.holds for stage in simulated(name).stages]


@pytest.mark.parametrize("name", ALL)
def test_states_are_the_simulations(name: str) -> None:
    config = layout(ALL[name])
    dims, stages = planned(config)
    for stage, other in zip(stages, simulated(name).stages, strict=True):
        assert state_bytes(config, dims, stage.parameters) == (other.weights, other.gradients, other.optimizer)


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_say_what_the_simulation_hears(name: str) -> None:
    """To the byte."""
    config = layout(LAYOUTS[name])
    dims, stages = planned(config)
    for stage, other in zip(stages, simulated(name).stages, strict=True):
        expected = Counter({(traffic.axis, traffic.kind): traffic.num_bytes for traffic in other.step})
        found: Counter[tuple[str, str]] = Counter()
        for traffic in stage_traffic(config, config.model, dims, stage):
            found[traffic.axis, traffic.kind] += traffic.num_bytes
        assert +found == +expected


def test_only_fp32_needs_no_copy_of_the_logits() -> None:
    peaks = {}
    for precision in Precision:
        config = layout({"train__precision": precision})
        dims, (stage,) = planned(config)
        peaks[precision] = activations(config, config.model, dims, stage).logits
    assert peaks[Precision.bf16] == peaks[Precision.fp16]
    tokens, rows = 2 * 1024, 8192
    assert peaks[Precision.bf16] == tokens * rows * (2 * 2 + 2 * 4) + 2 * 4 * tokens
    assert peaks[Precision.fp32] == tokens * rows * (2 * 4 + 4) + 2 * 4 * tokens


def test_a_block_by_hand() -> None:
    """Of 12.8B on a tensor rank of 4, as tests/simulate has it: what one more block adds."""
    sizes = {
        "hidden_size": 5120, "intermediate_size": 20480, "num_attention_heads": 40, "vocab_size": 30080,
        "rotary_pct": 0.5,
    }  # fmt: skip
    changes = {f"model__{key}": value for key, value in sizes.items()} | sized(tensor=4)
    changes |= {"parallel__sequence_parallel": True, "train__micro_batch_size": 1, "train__sequence_length": 2048}
    kept = []
    for num_layers in (2, 3):
        config = layout(changes | {"model__num_hidden_layers": num_layers})
        dims, (stage,) = planned(config)
        kept.append(activations(config, config.model, dims, stage).kept)
    states = 2048 * 5120 * 2
    assert kept[1] - kept[0] == (
        states // 4 + 2 * 2 * 512 * 2 + 2 * states // 4 + 3 * states // 4 + 2 * states // 4 + 2 * 2048 * 64 * 2
        + 2 * states // 4 + 10 * 2048 * 4 + 2 * 4 * states // 4
    )  # fmt: skip
