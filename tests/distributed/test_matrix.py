"""A tenth of the matrix of layouts, in which every two sizes or ways that can meet do meet."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest

from megakor.parallel.tensor import TensorRegion
from tests.distributed.matrix import (
    AXES,
    COMPARED,
    PAGE,
    ROUNDED,
    Differences,
    compare,
    every,
    in_bf16,
    page,
    with_variants,
)
from tests.distributed.tiny import Curve, Layout, curves, difference, holds, train_one
from tests.ranks import run_ranks

EVERY = every()
TENTH = len(EVERY) // 10
NUM_STEPS = 4  # of the twenty in `make matrix`
SEEN = [*AXES, "data"]
STAGES_OF_SHARDS = Layout(4, tensor=2, pipeline=2, sequence_parallel=True, micro_batch=2, num_layers=4)
"""Once broken in DeepSpeed: its cuts of activations that are split along the sequence already."""
STAGE_OF_THE_HEAD = Layout(4, pipeline=4, micro_batch=2, num_layers=4, variant="uniform stages")
"""Once a hang in DeepSpeed: its last stage has no parameters without weight decay, so one group fewer than the rest."""


def meetings(layout: Layout, size: int) -> set[tuple[Any, ...]]:
    """Every combination of so many of a layout's values."""
    return set(itertools.combinations([(axis, getattr(layout, axis)) for axis in SEEN], size))


def cost(layout: Layout) -> float:
    """About how much processor time a layout takes: ZeRO-3 gathers before every layer."""
    return layout.ranks * (1 + layout.num_micro_batches / 3) * (2.5 if layout.zero == 3 else 1)


def representative(layouts: list[Layout]) -> list[Layout]:
    """A tenth of the layouts: so that all pairs of values that occur do occur, then as many triples as fit.

    Greedy: the next is the one with the most that is new for its cost.
    """
    chosen = [STAGES_OF_SHARDS]
    for size, enough in ((2, len(layouts)), (3, TENTH)):
        missing = set().union(*(meetings(layout, size) for layout in layouts))
        missing -= set().union(*(meetings(layout, size) for layout in chosen))
        while missing and len(chosen) < enough:
            new = {layout: len(meetings(layout, size) & missing) / cost(layout) for layout in layouts}
            chosen.append(max(layouts, key=new.__getitem__))
            missing -= meetings(chosen[-1], size)
    return chosen


def last_of_each(layouts: list[Layout], *names: str) -> list[Layout]:
    """The last layouts, which split most, with each set of these values."""
    return list({tuple(getattr(layout, name) for name in names): layout for layout in layouts}.values())


CHOSEN = representative(EVERY)
SMALL = [layout for layout in EVERY if layout.ranks == 2 or layout.sizes == STAGES_OF_SHARDS.sizes]
VARIANTS = last_of_each(with_variants(SMALL), "variant", "pipeline")
BF16 = last_of_each(in_bf16(SMALL), "tensor", "pipeline", "context")
COMPARISONS = [*ROUNDED, *CHOSEN, *VARIANTS, STAGE_OF_THE_HEAD, *BF16]


@pytest.fixture(scope="module")
def differences() -> Differences:
    return compare(COMPARISONS, NUM_STEPS)


@pytest.mark.parametrize("layout", COMPARISONS, ids=str)
def test_the_layout_trains_the_same_model(differences: Differences, layout: Layout) -> None:
    found = differences[layout]
    assert holds(layout, found), f"loss {found[0]:.1e}, gradient norm {found[1]:.1e}; allowed {layout.tolerance}"


def test_every_two_values_that_can_meet_are_among_the_chosen() -> None:
    assert len(set(CHOSEN)) == len(CHOSEN) == TENTH
    assert set(CHOSEN) <= set(EVERY)
    pairs = set().union(*(meetings(layout, 2) for layout in EVERY))
    assert pairs == set().union(*(meetings(layout, 2) for layout in CHOSEN))
    assert {(axis, value) for axis, values in AXES.items() for value in values} <= {
        part for pair in pairs for part in pair
    }
    assert {layout.variant for layout in VARIANTS} == set(COMPARED)


def rows_of(text: str) -> dict[tuple[int, ...], tuple[int, list[float]]]:
    """The rows of a page's tables by ranks and sizes: runs and figures."""
    found = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        for row in re.findall(r"^\| (\d.*) \|$", section, re.MULTILINE):
            *sizes, sequence_parallel, runs, loss, norm, bf16_loss, bf16_norm = row.split(" | ")
            key = (int(section.split()[0]), *map(int, sizes), int(sequence_parallel == "yes"))
            found[key] = int(runs), [float(figure) for figure in (loss, norm, bf16_loss, bf16_norm)]
    return found


def test_the_page_tells_of_every_layout() -> None:
    told = rows_of(PAGE.read_text(encoding="utf-8"))
    assert {key: runs for key, (runs, _) in told.items()} == Counter((layout.ranks, *layout.sizes) for layout in EVERY)
    limits = [*Layout(2).tolerance, *Layout(2, precision="bf16").tolerance]
    for _, figures in told.values():
        assert all(0 < figure <= limit for figure, limit in zip(figures, limits, strict=True))


def test_the_page_shows_the_worst_of_a_row() -> None:
    layouts = [*ROUNDED, *EVERY, *with_variants(EVERY), *in_bf16(EVERY)]
    bad = next(layout for layout in EVERY if layout.ranks == 8 and layout.checkpointing == "full")
    differences = dict.fromkeys(layouts, (1e-7, 2e-7)) | {bad: (3e-7, 0.5)}
    told = rows_of(page(differences))
    assert told.pop((8, *bad.sizes))[1] == [3e-7, 0.5, 1e-7, 2e-7]
    assert all(figures == [1e-7, 2e-7, 1e-7, 2e-7] for _, figures in told.values())
    assert f"| fp32: every combination | {len(EVERY)} | 3.0e-07 | 1.0e-05 | 5.0e-01 | 1.0e-05 |" in page(differences)


def test_another_model_is_seen() -> None:
    first, second = Layout(zero=0), Layout(zero=0, variant="other seed")
    found = curves([first, second], num_steps=3)
    assert min(difference(found[second], found[first][0])) > 1e-3
    assert not holds(Layout(precision="bf16"), difference(found[second], found[first][0]))


def train_without_sums(layout: Layout) -> tuple[Curve, Curve]:
    """A curve, and that of a package which forgets to add up the gradients of norms over parts of the sequence."""
    whole = train_one(layout, 3)
    with patch.object(TensorRegion, "residual_parameters", lambda region, *parameters: parameters):
        return whole, train_one(layout, 3)


def test_a_missing_sum_is_seen() -> None:
    layout = Layout(2, tensor=2, sequence_parallel=True)
    (whole, lacking), _ = run_ranks(train_without_sums, 2, layout)
    assert min(difference([lacking], whole)) > 1e-4


def test_what_is_no_number_is_seen() -> None:
    assert difference([[(1.0, 1.0), (1.0, float("nan"))]], [(1.0, 1.0), (1.0, 1.0)]) == (0.0, float("inf"))
    assert not holds(Layout(), difference([], [(1.0, 1.0)]))
