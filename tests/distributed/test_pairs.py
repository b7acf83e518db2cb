"""From any layout to any other: what one saves, the other takes up in mid-run, and goes on as one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megakor.checkpoint.format import CheckpointManifest
from megakor.checkpoint.reader import CheckpointValues
from megakor.checkpoint.save import save_checkpoint
from megakor.config.resolved import plain
from megakor.data.stream import Batch, share
from megakor.train.engine import Engine, StepResult
from tests.distributed.runs import PP2, zero
from tests.ranks import run_ranks
from tests.train.engines import GLOBAL_BATCH, LR, MICRO_BATCH, NUM_TOKENS, SEQ, by_hand, config_of, make_engine, tokens
from tests.train.test_fragments import check_saved

TP2: dict[str, Any] = {"parallel__tensor_parallel_size": 2}
SP: dict[str, Any] = {"parallel__sequence_parallel": True}
CP2: dict[str, Any] = {"parallel__context_parallel_size": 2}
OFFLOAD: dict[str, Any] = {"parallel__offload_optimizer": True}
SAVED, STEPS = 3, 5

SOURCES: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2 pp2 dp2 zero1": (8, TP2 | PP2),
    "tp2 dp2 zero2 sp": (4, TP2 | SP | zero(2)),
    "dp2 zero3": (2, zero(3)),
    "dp1": (1, {}),
}
TARGETS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp3 zero3": (3, zero(3)),
    "pp2": (2, PP2),
    "tp2 zero3": (2, TP2 | zero(3)),
    "dp2 zero2 offload": (2, zero(2) | OFFLOAD),
    "cp2 zero1": (2, CP2),
    "tp2 pp2 sp": (4, TP2 | PP2 | SP),
}


def batches(step: int, data_rank: int, data: int) -> list[Batch]:
    """A data rank's part of a global batch, also where the ranks do not divide it: masked rows fill it up."""
    ids, mask = tokens(step)
    first, last = share(GLOBAL_BATCH, data_rank, data)
    rounds = -(-GLOBAL_BATCH // (data * MICRO_BATCH))
    own_ids = np.zeros((rounds * MICRO_BATCH, SEQ + 1), dtype=np.int64)
    own_mask = np.zeros((rounds * MICRO_BATCH, SEQ), dtype=np.float32)
    own_ids[: last - first], own_mask[: last - first] = ids[first:last], mask[first:last]
    parts = [slice(start, start + MICRO_BATCH) for start in range(0, len(own_ids), MICRO_BATCH)]
    return [Batch(own_ids[part, :-1], own_ids[part, 1:], own_mask[part], int(mask.sum())) for part in parts]


def steps(engine: Engine, first: int, last: int) -> list[StepResult]:
    return [
        engine.train_step(batches(step, engine.data_rank, engine.dims.data), LR, step) for step in range(first, last)
    ]


def save_source(run: Path, changes: dict[str, Any]) -> None:
    engine = make_engine(config_of(**changes))
    steps(engine, 0, SAVED)
    about = {"name": "adamw", **engine.optimizer_state()}
    save_checkpoint(run, CheckpointManifest(SAVED, NUM_TOKENS, plain(engine.model), "", about, {}, {}), engine.pieces)


def take_up(folder: Path, changes: dict[str, Any]) -> dict[str, list[StepResult]]:
    """One engine, which has steps of its own behind it, takes up each checkpoint in turn."""
    engine, found = make_engine(config_of(**changes)), {}
    for name in SOURCES:
        steps(engine, 0, 1)
        checkpoint = folder / name / "checkpoints" / f"step-{SAVED:08d}"
        with CheckpointValues(checkpoint) as values:
            engine.restore(values)
        assert engine.optimizer_state()["steps"] == SAVED
        check_saved(engine, checkpoint)
        found[name] = steps(engine, SAVED, STEPS)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for name, (world_size, changes) in SOURCES.items():
        run_ranks(save_source, world_size, folder / name, changes)
    return folder


@functools.cache
def reference() -> list[StepResult]:
    """By plain torch on one process."""
    return by_hand(config_of(), STEPS)[0][SAVED:]


@pytest.mark.parametrize("target", TARGETS)
def test_every_pair(saved: Path, target: str) -> None:
    world_size, changes = TARGETS[target]
    ranks = run_ranks(take_up, world_size, saved, changes)
    for name in SOURCES:
        assert all(found[name] == ranks[0][name] for found in ranks)
        for result, expected in zip(ranks[0][name], reference(), strict=True):
            assert result.loss == pytest.approx(expected.loss, rel=1e-5), name
            assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5), name


def test_pairs_are_of_every_kind() -> None:
    """At least 12 of them, and none that stays in its layout."""
    assert len(SOURCES) * len(TARGETS) >= 12
    assert not {repr(layout) for layout in SOURCES.values()} & {repr(layout) for layout in TARGETS.values()}


def peak_of_loading(folder: Path) -> tuple[int, int]:
    """Bytes of a rank's part and the most that loading it needed besides, in a process of two."""
    import resource

    engine = make_engine(config_of(model__hidden_size=1024, model__intermediate_size=4096, **zero(3)))
    own = sum(piece.values.numel() * 4 for piece in engine.pieces)
    about = {"name": "adamw", **engine.optimizer_state()}
    manifest = CheckpointManifest(SAVED, NUM_TOKENS, plain(engine.model), "", about, {}, {})
    checkpoint = save_checkpoint(folder, manifest, engine.pieces)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with CheckpointValues(checkpoint) as values:
        engine.load(values)
    torch.zeros(1)
    return own, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_loading_takes_little_memory(tmp_path: Path) -> None:
    """Besides its part, which is there already, a rank holds chunks of 4 MiB in four threads, twice at most."""
    for own, besides in run_ranks(peak_of_loading, 2, tmp_path):
        print(f"a part of {own >> 20} MiB took {besides >> 20} MiB besides")
        assert own > 200 << 20
        assert besides <= 128 << 20
