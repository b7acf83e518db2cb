"""Simulated layouts against real ones: what ranks say, keep and hold is the same, to the byte."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megakor.config.compose import load_experiment
from megakor.config.schema import ActivationCheckpointing, PretrainConfig, SimulateConfig
from megakor.model.specs import num_parameters
from megakor.parallel.dims import ParallelDims
from megakor.parallel.groups import Groups
from megakor.simulate.layout import Simulation, check_parameters, simulate
from megakor.simulate.stage import Pass, build_quietly, fake_rank, run_pass
from megakor.train.device import end_process_group, start_fake_process_group
from tests.distributed.runs import BF16, TIED, Made, configuration
from tests.ranks import run_ranks
from tests.simulate.real import Seen, watched_steps

SIZE = {"model__vocab_size": 256, "model__num_attention_heads": 4, "train__micro_batch_size": 1}
PIPELINE = {"parallel__tensor_parallel_size": 2, "parallel__pipeline_parallel_size": 2}
SEQUENCE = {"parallel__sequence_parallel": True}
WIDE = {"model__hidden_size": 64, "model__intermediate_size": 512, "train__sequence_length": 64}
CONTEXT = {"parallel__tensor_parallel_size": 2, "parallel__context_parallel_size": 2}


def recomputed(kind: str) -> dict[str, Any]:
    return {"train__activation_checkpointing": ActivationCheckpointing(kind)}


PIPELINED = {
    "pp2 tp2 sp dp2 tied bf16": PIPELINE | SEQUENCE | TIED | BF16,
    "pp2 tp2 dp2 selective": PIPELINE | recomputed("selective"),
    "pp2 tp2 sp dp2 full": PIPELINE | SEQUENCE | recomputed("full"),
}
PLAIN = {
    "tp2 cp2 dp2 zero2 bf16": CONTEXT | BF16 | {"parallel__zero_stage": 2},
    "tp2 cp2 sp dp2 in turn": CONTEXT | SEQUENCE | {"model__use_parallel_residual": False},
    "cp4 dp2 full": {"parallel__context_parallel_size": 4} | recomputed("full"),
}
LAYOUTS = PIPELINED | PLAIN


def layout(name_or_changes: str | dict[str, Any]) -> PretrainConfig:
    changes = LAYOUTS[name_or_changes] if isinstance(name_or_changes, str) else name_or_changes
    return configuration(Made("-", "-", "-"), Path("-"), **SIZE, **changes)


@functools.cache
def simulated(name: str) -> Simulation:
    return simulate(SimulateConfig(**vars(layout(name)), world_size=8))


@pytest.fixture(scope="module")
def real() -> dict[str, list[Seen]]:
    """What each of 8 gloo ranks did in one step of each layout. Pipelines have processes of their own."""
    found = {}
    for names in (PIPELINED, PLAIN):
        ranks = run_ranks(watched_steps, 8, [layout(name) for name in names])
        found |= {name: list(seen) for name, seen in zip(names, zip(*ranks, strict=True), strict=True)}
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_say_what_the_simulation_says(real: dict[str, list[Seen]], name: str) -> None:
    """Every collective and every send of a step, on every rank: how many of each kind, and their bytes."""
    simulation = simulated(name)
    dims, axes = simulation.dims, {"replicas": ("data", "context"), "tied stages": ("pipeline",)}
    for rank, seen in enumerate(real[name]):
        counts, sizes = {}, {}
        for traffic in simulation.stages[dims.pipeline_rank(rank)].step:
            if traffic.axis == "pipeline":
                place = rank + (4 if traffic.kind == "send_hidden_states" else -4), "send"
            else:
                place = tuple(dims.peers(rank, *axes.get(traffic.axis, (traffic.axis,)))), traffic.kind
            counts[place], sizes[place] = traffic.count, traffic.num_bytes
        assert dict(seen.sizes) == sizes
        assert {place: count for place, count in counts.items() if count is not None} == {
            place: count for place, count in seen.calls.items() if counts[place] is not None
        }


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_keep_what_the_simulation_keeps(real: dict[str, list[Seen]], name: str) -> None:
    """What a micro-batch leaves between its passes, and how many micro-batches do so at once."""
    simulation = simulated(name)
    for rank, seen in enumerate(real[name]):
        stage = simulation.stages[simulation.dims.pipeline_rank(rank)]
        assert seen.kept == stage.kept
        if "full" not in name and "selective" not in name:  # where nothing is recomputed and saved in between
            last_of_pipeline = name in PIPELINED and stage.stage == 1
            logits = 32 * 128 * 2 if last_of_pipeline else 0  # DeepSpeed keeps those of the micro-batch before
            assert seen.most_saved == stage.in_flight * seen.saved + logits
    assert [stage.in_flight for stage in simulation.stages] == ([2, 1] if name in PIPELINED else [1])


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_hold_what_the_formula_says(real: dict[str, list[Seen]], name: str) -> None:
    simulation = simulated(name)
    for rank, seen in enumerate(real[name]):
        stage = simulation.stages[simulation.dims.pipeline_rank(rank)]
        assert (seen.weights, seen.optimizer) == (stage.weights, stage.optimizer)
        assert seen.gradients in (0, stage.gradients)
    assert any(seen.gradients for seen in real["pp2 tp2 sp dp2 tied bf16"])


def passed(config: PretrainConfig, rank: int, world_size: int = 8) -> Pass:
    dims = ParallelDims.from_config(config.parallel, world_size)
    with fake_rank(rank, dims) as groups:
        return run_pass(config, config.model, build_quietly(config, config.model, 250, groups), groups)


def passed_for_real(config: PretrainConfig, rank: int) -> tuple[Pass, int]:
    """The same on real tensors, and the most bytes that PyTorch's allocator had given out meanwhile."""
    start_fake_process_group(rank, 8)
    try:
        groups = Groups.create(ParallelDims.from_config(config.parallel, 8))
        built = build_quietly(config, config.model, 250, groups)
        with torch.no_grad():
            for _, parameter in built.named:
                parameter.zero_()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run = run_pass(config, config.model, built, groups)
    finally:
        end_process_group()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return run, max(itertools.accumulate(sizes))


@pytest.mark.parametrize("rank", [0, 7])
@pytest.mark.parametrize(
    "changes",
    [PIPELINE | SEQUENCE, PIPELINE | recomputed("full"), PIPELINE | SEQUENCE | recomputed("selective"), CONTEXT],
    ids=["pp", "pp full", "pp selective", "cp"],
)
def test_the_peak_is_the_allocators(changes: dict[str, Any], rank: int) -> None:
    """In fp32, and with a wide feed-forward layer: the host's attention kernel has a workspace, which nobody sees."""
    config = layout(changes | WIDE)
    simulated_pass = passed(config, rank)
    real_pass, peak = passed_for_real(config, rank)
    assert real_pass == simulated_pass
    assert peak == simulated_pass.peak > simulated_pass.kept


def test_one_tensor_rank_speaks_for_all() -> None:
    """The last one has the padding of the vocabulary, and less to compute in the loss."""
    first, last = (passed(layout(PIPELINE | SEQUENCE), rank) for rank in (4, 5))
    assert last.peak <= first.peak
    assert dataclasses.replace(last, peak=first.peak) == first


@pytest.mark.parametrize("changes", [PIPELINE | TIED, PIPELINE | SEQUENCE, CONTEXT | TIED])
def test_stages_and_tensor_ranks_hold_the_model_once(changes: dict[str, Any]) -> None:
    config = layout(changes)
    dims, total = ParallelDims.from_config(config.parallel, 8), 0
    for rank in range(8):
        if dims.data_rank(rank) == dims.coordinate(rank, "context") == 0:
            with fake_rank(rank, dims) as groups:
                built = build_quietly(config, config.model, 250, groups)
                own = [p.numel() for name, p in built.named if not built.held[name].saved_elsewhere]
                total += sum(own)
    assert total == num_parameters(config.model)


@pytest.mark.parametrize("what", ["missing", "twice", "short"])
def test_parameters_that_do_not_add_up_are_noticed(what: str) -> None:
    config = layout(PIPELINE)
    passes = [passed(config, rank) for rank in (0, 4)]
    check_parameters(config.model, passes)
    parts = passes[0].parts
    wrong = {
        "missing": parts[1:],
        "twice": [*parts, passes[1].parts[0]],
        "short": [dataclasses.replace(parts[0], numel=parts[0].numel - 1), *parts[1:]],
    }[what]
    with pytest.raises(AssertionError):
        check_parameters(config.model, [dataclasses.replace(passes[0], parts=wrong), passes[1]])


def test_dropout_and_every_kind_of_layer_run_on_fake_tensors() -> None:
    dropout = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
    others = {"model__attention_bias": False, "parallel__pipeline_partition": "uniform"}
    config = layout(PIPELINE | SEQUENCE | dropout | others)
    simulation = simulate(SimulateConfig(**vars(config), world_size=4))
    assert simulation.parameters == num_parameters(config.model)


@pytest.fixture(scope="module")
def largest() -> tuple[Simulation, int]:
    """The 12.8B layout, and by how many bytes this process has grown meanwhile."""
    config = load_experiment("simulate", "12_8b_256xa100")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return simulate(config), 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_the_largest_experiment(largest: tuple[Simulation, int]) -> None:
    simulation, grown = largest
    assert simulation.parameters == 12_893_603_840
    assert simulation.dims == ParallelDims(pipeline=4, data=16, context=1, tensor=4, sequence_parallel=True)
    assert [stage.in_flight for stage in simulation.stages] == [4, 3, 2, 1]
    assert simulation.num_micro_batches == 16
    assert grown < 2**30  # its weights would take 24 GiB
    assert all(stage.memory < 0.9 * 80e9 for stage in simulation.stages)  # an A100 has 80 GB


def test_a_stage_of_blocks_by_hand(largest: tuple[Simulation, int]) -> None:
    """What a block says and keeps, from the shapes: hidden states are 20 MiB, the part of a tensor rank 5 MiB."""
    simulation, _ = largest
    stage, states = simulation.stages[1], 2048 * 5120 * 2
    assert stage.holds == "blocks 10 to 19"
    traffic = {(found.axis, found.kind): (found.count, found.num_bytes) for found in stage.micro_batch}
    assert traffic == {
        ("tensor", "all_gather"): (10 * 5, 10 * 5 * states // 4),  # two columns in both passes, the join backward
        ("tensor", "reduce_scatter"): (10 * 3, 10 * 3 * states),
        ("tensor", "all_reduce"): (10 * 3, 10 * 6 * 5120 * 4),  # two norms and the row biases, in fp32
        ("pipeline", "send_hidden_states"): (1, states // 4),
        ("pipeline", "send_gradients"): (1, states // 4),
    }
    block = (
        states // 4  # the input of the norms
        + 2 * 2 * 512 * 2  # their means and deviations
        + 2 * states // 4  # this rank's part of the inputs of both columns
        + 3 * states // 4  # queries, keys and values
        + 2 * states // 4  # rotated queries and keys
        + 2 * 2048 * 64 * 2  # rotary tables
        + 2 * states // 4  # the output of attention, by head and by position
        + 10 * 2048 * 4  # its log-sum-exps
        + 2 * 4 * states // 4  # before and after GELU
    )
    assert stage.kept == 10 * block + 2 * states // 4  # what was received, and the output
    assert 3 * stage.kept < stage.activations < 3.2 * stage.kept
