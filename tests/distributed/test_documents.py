"""Several documents in a row, in every kind of layout: one curve, that of one process with the whole batch at once.

Borders differ from row to row, so those of another micro-batch, rank or part of a sequence would lead elsewhere.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megakor.data.stream import Batch
from tests.distributed.tiny import Curve, Layout, curves, difference, holds
from tests.ranks import run_ranks
from tests.train.engines import Heldout, config_of, make_engine

NUM_STEPS = 6
LAYOUTS = {
    "micro-batches": Layout(micro_batch=2),
    "full": Layout(micro_batch=2, checkpointing="full"),
    "selective": Layout(micro_batch=2, checkpointing="selective"),
    "tensor, sequence": Layout(2, tensor=2, sequence_parallel=True, micro_batch=4),
    "tensor, sequence, full": Layout(2, tensor=2, sequence_parallel=True, micro_batch=2, checkpointing="full"),
    "context": Layout(2, context=2, micro_batch=4),
    "context, selective": Layout(2, context=2, micro_batch=2, checkpointing="selective"),
    "ZeRO-3": Layout(2, zero=3, micro_batch=2),
    "ZeRO-3, full": Layout(2, zero=3, micro_batch=2, checkpointing="full"),
    "stages": Layout(2, pipeline=2, micro_batch=8),
    "stages, 4 micro-batches": Layout(2, pipeline=2, micro_batch=2),
    "stages, 4 micro-batches, full": Layout(2, pipeline=2, micro_batch=2, checkpointing="full"),
    "stages, 8 micro-batches, selective": Layout(2, pipeline=2, micro_batch=1, checkpointing="selective"),
    "stages between": Layout(4, pipeline=4, micro_batch=1, num_layers=4, checkpointing="full"),
    "stages between, dropout": Layout(4, pipeline=4, micro_batch=8, num_layers=4, variant="dropout"),
}
RUNS = {name: replace(layout, documents=True) for name, layout in LAYOUTS.items()}


@pytest.fixture(scope="module")
def found() -> dict[Layout, list[Curve]]:
    references = {layout.reference for layout in RUNS.values()}
    return curves([*RUNS.values(), *references, Layout(zero=0)], NUM_STEPS, group_size=6)


@pytest.mark.parametrize("name", RUNS)
def test_layouts_agree(found: dict[Layout, list[Curve]], name: str) -> None:
    layout = RUNS[name]
    far = difference(found[layout], found[layout.reference][0])
    assert holds(layout, far), far


def test_borders_change_the_curve(found: dict[Layout, list[Curve]]) -> None:
    loss, norm = difference(found[Layout(zero=0)], found[Layout(zero=0, documents=True)][0])
    assert loss > 1e-4
    assert norm > 1e-3


class HeldoutDocuments(Heldout):
    """Borders at other places in every window."""

    def windows(self, start: int, count: int) -> Batch:
        batch = super().windows(start, count)
        shape = (start + count, batch.labels.shape[1])
        begins = np.random.default_rng(5).random((1000, shape[1]))[: shape[0]] < 0.3
        return replace(batch, documents=begins.cumsum(axis=1, dtype=np.int32)[start:])


def evaluated(stages: int) -> tuple[float, float]:
    """With and without borders; training in between, so that nothing stays behind."""
    engine = make_engine(config_of(parallel__pipeline_parallel_size=stages))
    with_borders = engine.evaluate(HeldoutDocuments())
    without = engine.evaluate(Heldout())
    assert engine.evaluate(HeldoutDocuments()) == with_borders
    return with_borders, without


def test_stages_evaluate_the_same() -> None:
    """The middle one of three sees no batch."""
    ((expected, without),) = run_ranks(evaluated, 1, 1)
    assert abs(expected / without - 1) > 1e-3
    for found in run_ranks(evaluated, 3, 3):
        assert found == pytest.approx((expected, without), rel=1e-6)
