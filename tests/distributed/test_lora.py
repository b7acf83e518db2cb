"""Adapters in every kind of layout: the steps of PEFT's layers, and checkpoints that any other layout takes up."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from megakor.checkpoint.format import WEIGHT, CheckpointManifest
from megakor.checkpoint.reader import CheckpointValues
from megakor.checkpoint.save import save_checkpoint
from megakor.config.schema import LoraConfig
from megakor.model.lora import adapter_specs, is_adapter
from megakor.train.engine import Engine, StepResult
from megakor.train.fragments import is_partitioned, own_range
from megakor.train.run import plain
from megakor.train.values import AdaptedValues, SeededValues
from tests.distributed.runs import ADAFACTOR, BF16, PP2, TIED, zero
from tests.distributed.test_pairs import CP2, OFFLOAD, SP, TP2, batches, steps
from tests.ranks import run_ranks
from tests.train.adapters import EVERYWHERE, by_peft, make_adapted
from tests.train.engines import LR, NUM_TOKENS, config_of, make_engine, model_of

SAVED, STEPS = 3, 5
OFFLOAD_ALL = OFFLOAD | {"parallel__offload_parameters": True}

SOURCES: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2 pp2 sp": (4, TP2 | PP2 | SP),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "dp2 zero2": (2, zero(2)),
    "dp2 zero3": (2, zero(3)),
    "dp1": (1, {}),
}
TARGETS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, TP2),
    "tp2 sp zero3": (2, TP2 | SP | zero(3)),
    "pp2": (2, PP2),
    "pp2 tied": (2, PP2 | TIED),
    "dp2": (2, {}),
    "dp2 zero0": (2, zero(0)),
    "dp2 zero2 offload": (2, zero(2) | OFFLOAD),
    "dp3 zero3": (3, zero(3)),
    "dp2 zero3 offload": (2, zero(3) | OFFLOAD_ALL),
    "cp2": (2, CP2),
    "dp1": (1, {}),
}
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2 sp bf16": (2, TP2 | SP | BF16),
    "pp2 bf16": (2, PP2 | BF16),
    "dp2 zero3 bf16": (2, zero(3) | BF16),
    # It divides gradients by their own size: heads rotate whole, or some would be rounding alone.
    "tp2 adafactor": (2, TP2 | ADAFACTOR | {"model__rotary_pct": 1.0}),
}


def save_adapters(run: Path, changes: dict[str, Any]) -> list[StepResult]:
    """The first steps, a checkpoint, and the steps after it."""
    engine = make_adapted(config_of(**changes))
    first = steps(engine, 0, SAVED)
    about = {"name": "adamw", **engine.optimizer_state()}
    save_checkpoint(run, CheckpointManifest(SAVED, NUM_TOKENS, plain(engine.model), "", about, {}, {}), engine.pieces)
    return first + steps(engine, SAVED, STEPS)


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / f"step-{SAVED:08d}"


def weights_of(engine: Engine) -> dict[str, torch.Tensor]:
    """A copy of what this rank's model holds, by name."""
    parts = {
        name: parameter.ds_tensor if is_partitioned(parameter) else parameter  # type: ignore[attr-defined]
        for name, parameter in engine.built.named
    }
    return {name: part.detach().clone() for name, part in parts.items()}


def check_weights(engine: Engine, folder: Path) -> None:
    """The adapters are the saved ones, in masters, moments and model alike; the base's weights are the seed's."""
    with CheckpointValues(folder) as values:
        assert {piece.name for piece in engine.pieces} <= {name.partition("/")[2] for name in values.manifest.tensors}
        for piece in engine.pieces:
            stop = piece.offset + piece.values.numel()
            assert torch.equal(piece.values, values.read(piece.state, piece.name, piece.offset, stop, piece.shard))
        seeded = SeededValues(engine.model, 7)
        for name, parameter in engine.built.named:
            start, weights = 0, parameter.detach().flatten()
            if is_partitioned(parameter):
                start, numel = own_range(parameter)
                weights = parameter.ds_tensor[:numel]  # type: ignore[attr-defined]
            expected = torch.empty_like(weights)
            source = values if is_adapter(name) else seeded
            source.fill(expected, WEIGHT, name, start, engine.built.held[name].shard)  # type: ignore[attr-defined]
            assert torch.equal(weights, expected), name


def take_up(folder: Path, changes: dict[str, Any]) -> dict[str, list[StepResult]]:
    """One engine, which has steps of its own behind it, takes up each checkpoint in turn."""
    config = config_of(**changes)
    engine, found = make_adapted(config), {}
    for name in SOURCES:
        steps(engine, 0, 1)
        with CheckpointValues(checkpoint_of(folder / name)) as values:
            engine.restore(AdaptedValues(SeededValues(engine.model, config.train.seed), values))
        assert engine.optimizer_state()["steps"] == SAVED
        check_weights(engine, checkpoint_of(folder / name))
        found[name] = steps(engine, SAVED, STEPS)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[list[StepResult]]]]:
    """The folder of the runs, and every rank's results."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {name: run_ranks(save_adapters, size, folder / name, changes) for name, (size, changes) in SOURCES.items()}
    return folder, found


@functools.cache
def reference(tied: bool = False) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
    return by_peft(config_of(**(TIED if tied else {})), STEPS)


def check_results(found: list[StepResult], expected: list[StepResult], tolerance: float = 1e-5) -> None:
    for result, other in zip(found, expected, strict=True):
        assert result.loss == pytest.approx(other.loss, rel=tolerance)
        assert result.grad_norm == pytest.approx(other.grad_norm, rel=tolerance)


@pytest.mark.parametrize("name", SOURCES)
def test_steps_are_those_of_peft(saved: tuple, name: str) -> None:
    for results in saved[1][name]:
        check_results(results, reference()[0], 2e-6)


@pytest.mark.parametrize("name", SOURCES)
def test_a_checkpoint_holds_the_adapters_and_their_state_alone(saved: tuple, name: str) -> None:
    folder = checkpoint_of(saved[0] / name)
    manifest = CheckpointManifest.load(folder)
    manifest.check_contents(folder)
    specs = adapter_specs(model_of(config_of()), EVERYWHERE)
    shapes = {f"{state}/{s.name}": list(s.shape) for s in specs for state in (WEIGHT, "exp_avg", "exp_avg_sq")}
    assert {key: entry.shape for key, entry in manifest.tensors.items()} == shapes
    assert manifest.optimizer["steps"] == SAVED


@pytest.mark.parametrize("target", TARGETS)
def test_every_pair(saved: tuple, target: str) -> None:
    """Any layout takes up any checkpoint, and goes on as PEFT's layers do, or to the bit as the same layout did."""
    world_size, changes = TARGETS[target]
    ranks = run_ranks(take_up, world_size, saved[0], changes)
    for name in SOURCES:
        assert all(found[name] == ranks[0][name] for found in ranks)
        if (world_size, changes) == SOURCES[name]:
            assert ranks[0][name] == saved[1][name][0][SAVED:]
        if "tied" not in target:  # another model, which the same adapters fit
            check_results(ranks[0][name], reference()[0][SAVED:])


def run_otherwise(changes: dict[str, Any]) -> tuple[list[StepResult], bool]:
    """A few steps; and whether they left the frozen weights as they were."""
    engine = make_adapted(config_of(**changes))
    before = weights_of(engine)
    lr = 1e-3 if ADAFACTOR.items() <= changes.items() else LR
    results = [engine.train_step(batches(step, engine.data_rank, engine.dims.data), lr, step) for step in range(SAVED)]
    after = weights_of(engine)
    moved = {name for name, weights in after.items() if not torch.equal(weights, before[name])}
    return results, moved == {name for name in after if is_adapter(name)}


@pytest.mark.parametrize("name", OTHERS)
def test_other_arithmetic(name: str) -> None:
    world_size, changes = OTHERS[name]
    ranks = run_ranks(run_otherwise, world_size, changes)
    alone = {key: value for key, value in changes.items() if not key.startswith("parallel")}
    (expected, _), *_ = run_ranks(run_otherwise, 1, alone)
    for results, frozen in ranks:
        assert frozen, "a step must change the adapters, and them alone"
        check_results(results, expected, 2**-7 if "bf16" in name else 1e-5)


def start_pipeline(partition: str) -> str:
    changes = PP2 | {"parallel__pipeline_partition": partition, "model__num_hidden_layers": 2}
    try:
        make_adapted(config_of(**changes))
    except ValueError as error:
        return str(error)
    return "started"


def test_a_stage_without_a_block_is_refused_on_all_ranks() -> None:
    """DeepSpeed's optimizer needs something to train on every stage."""
    refused = run_ranks(start_pipeline, 2, "type:Embedding|Norm")
    assert refused == [refused[0]] * 2
    assert refused[0] == (
        "parallel.pipeline_partition=type:Embedding|Norm must give each stage a block, since adapters are in blocks; "
        "stage 1 has none; nearest: type:Block"
    )
    assert run_ranks(start_pipeline, 2, "type:Block") == ["started"] * 2


def held_bytes(changes: dict[str, Any], rank: int) -> tuple[int, int]:
    """Elements of fp32 masters and moments that this rank holds with adapters, and without."""
    config = config_of(**changes)
    adapted = make_adapted(config, LoraConfig(rank=rank))
    whole = make_engine(config)
    return tuple(sum(piece.values.numel() for piece in engine.pieces) for engine in (adapted, whole))  # type: ignore[return-value]


def test_optimizer_state_is_of_the_adapters_alone() -> None:
    specs = adapter_specs(model_of(config_of()), LoraConfig(rank=2))
    for stage in (1, 3):
        found = run_ranks(held_bytes, 2, zero(stage), 2)
        assert sum(adapted for adapted, _ in found) == 3 * sum(torch.Size(spec.shape).numel() for spec in specs)
        assert all(10 * adapted < whole for adapted, whole in found)
