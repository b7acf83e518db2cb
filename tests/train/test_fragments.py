"""What every rank owns of weights and optimizer state, its norms and its updates, in every kind of layout.

The reference is a whole model on one process, trained by plain torch.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megakor.checkpoint.format import CheckpointManifest
from megakor.checkpoint.reader import CheckpointValues, read_weights
from megakor.checkpoint.save import save_checkpoint
from megakor.config.resolved import plain
from megakor.model.parameters import initial_value
from megakor.model.specs import parameter_specs
from megakor.train.engine import Engine, StepResult
from megakor.train.fragments import is_partitioned, own_range
from megakor.train.values import SeededValues
from tests.distributed.runs import ADAFACTOR, PP2, TIED, zero
from tests.ranks import run_ranks
from tests.train.engines import CLIP, NUM_TOKENS, by_hand, config_of, make_engine, model_of, train

NUM_STEPS = 3
TP2 = {"parallel__tensor_parallel_size": 2}
SP = {"parallel__sequence_parallel": True}
CP2 = {"parallel__context_parallel_size": 2}

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"dp1": {}},
    2: {
        "dp2 zero0": zero(0),
        "dp2 zero2 offload": zero(2) | {"parallel__offload_optimizer": True},
        "dp2 zero3": zero(3),
        "dp2 zero3 tied": zero(3) | TIED,
        "tp2": TP2,
        "tp2 sp": TP2 | SP,
        "tp2 sp tied": TP2 | SP | TIED,
        "cp2": CP2,
        "tp2 adafactor": TP2 | ADAFACTOR,
        "pp2 tied": PP2 | TIED,
    },
    4: {
        "tp2 dp2 zero3 sp": TP2 | SP | zero(3),
        "tp2 cp2 zero2": TP2 | CP2 | zero(2),
        "tp2 cp2 sp adafactor": TP2 | CP2 | SP | ADAFACTOR,
        "tp2 pp2 sp tied": TP2 | PP2 | SP | TIED,
    },
}
ALL = {name: changes for layouts in LAYOUTS.values() for name, changes in layouts.items()}


def check_start(engine: Engine, seed: int) -> None:
    """A fresh engine has the seed's weights and moments of zero."""
    values = SeededValues(engine.model, seed)
    assert engine.pieces
    for piece in engine.pieces:
        expected = torch.empty_like(piece.values)
        values.fill(expected, piece.state, piece.name, piece.offset, piece.shard)
        assert torch.equal(piece.values, expected), (piece.state, piece.name)


def check_saved(engine: Engine, folder: Path) -> None:
    """What this rank holds, written by it or by another, is what was saved, and what its model computes with."""
    with CheckpointValues(folder) as values:
        for piece in engine.pieces:
            stop = piece.offset + piece.values.numel()
            saved = values.read(piece.state, piece.name, piece.offset, stop, piece.shard)
            assert torch.equal(piece.values, saved), (piece.state, piece.name)
        for name, parameter in engine.built.named:
            shard, weights, start = engine.built.held[name].shard, parameter.detach().flatten(), 0
            if is_partitioned(parameter):
                start, numel = own_range(parameter)
                weights = parameter.ds_tensor[:numel]  # type: ignore[attr-defined]
            assert torch.equal(weights, values.weight(name, start, start + weights.numel(), shard)), name


def run_layout(run: Path, changes: dict[str, Any]) -> list[StepResult]:
    config = config_of(**changes)
    engine = make_engine(config)
    check_start(engine, config.train.seed)
    results = train(engine, NUM_STEPS)
    manifest = CheckpointManifest(
        NUM_STEPS, NUM_TOKENS, plain(engine.model), "", {"name": "", **engine.optimizer_state()}, {}, {}
    )
    check_saved(engine, save_checkpoint(run, manifest, engine.pieces))
    dist.barrier()
    return results


def run_layouts(folder: Path, layouts: dict[str, dict[str, Any]]) -> dict[str, list[StepResult]]:
    return {name: run_layout(folder / name, changes) for name, changes in layouts.items()}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[list[StepResult]]]]:
    """The folder of the runs, and every rank's results; pipelines in processes of their own (see `run_all`)."""
    folder, found = tmp_path_factory.mktemp("fragments"), {}
    for world_size, layouts in LAYOUTS.items():
        for pipelined in (False, True):
            own = {name: changes for name, changes in layouts.items() if (PP2.items() <= changes.items()) is pipelined}
            if own:
                ranks = run_ranks(run_layouts, world_size, folder, own)
                found |= {name: [answers[name] for answers in ranks] for name in own}
    return folder, found


@functools.cache
def whole(tied: bool) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
    """Results of the steps on one process, and the weights after them."""
    return by_hand(config_of(**(TIED if tied else {})), NUM_STEPS)


@pytest.mark.parametrize("name", ALL)
def test_losses_and_norms_are_those_of_whole_gradients(ran: tuple, name: str) -> None:
    """Every parameter counts once, whether tensor ranks or stages share it or ZeRO has cut it; all ranks are told."""
    expected, _ = whole("tied" in name)
    num_steps = 1 if "adafactor" in name else NUM_STEPS
    for results in ran[1][name]:
        for found, other in zip(results[:num_steps], expected[:num_steps], strict=True):
            assert found.loss == pytest.approx(other.loss, rel=2e-6)
            assert found.grad_norm == pytest.approx(other.grad_norm, rel=5e-6)
            assert found.grad_norm > 2 * CLIP


@pytest.mark.parametrize("name", [name for name in ALL if "adafactor" not in name])
def test_updates_are_those_of_clipped_gradients(ran: tuple, name: str) -> None:
    config = config_of(**ALL[name])
    _, expected = whole("tied" in name)
    found = read_weights(ran[0] / name / "checkpoints" / f"step-{NUM_STEPS:08d}")
    assert found.keys() == expected.keys()
    for spec in parameter_specs(model_of(config)):
        moved = (expected[spec.name] - initial_value(spec, config.train.seed)).abs().max().item()
        # To 1e-5 of the update, and two units in the last place of the weight.
        torch.testing.assert_close(found[spec.name], expected[spec.name], rtol=2**-22, atol=1e-5 * moved)


@pytest.mark.parametrize("name", ALL)
def test_a_checkpoint_holds_every_state_whole(ran: tuple, name: str) -> None:
    config = config_of(**ALL[name])
    folder = ran[0] / name / "checkpoints" / f"step-{NUM_STEPS:08d}"
    manifest = CheckpointManifest.load(folder)
    manifest.check_contents(folder)
    assert manifest.optimizer.keys() == {"name", "groups", "steps", "loss_scale"}  # no random state
    assert manifest.optimizer["steps"] == NUM_STEPS
    tensor = config.parallel.tensor_parallel_size
    expected: dict[str, tuple[tuple[int, ...], int]] = {}
    for spec in parameter_specs(model_of(config)):
        moments = {"exp_avg": spec.shape, "exp_avg_sq": spec.shape}
        if "adafactor" in name:
            matrix = len(spec.shape) > 1
            rows_and_columns = {"exp_avg_sq_row": spec.shape[:1], "exp_avg_sq_col": spec.shape[1:]}
            moments = rows_and_columns if matrix else {"exp_avg_sq": spec.shape}
        for state, shape in {"weight": spec.shape, **moments}.items():
            whole = spec.shard_dim is None or state in ("exp_avg_sq_row", "exp_avg_sq_col")
            expected[f"{state}/{spec.name}"] = (shape, 1 if whole else tensor)
    assert {key: (tuple(entry.shape), entry.num_shards) for key, entry in manifest.tensors.items()} == expected
