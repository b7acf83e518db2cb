"""The search: every layout that is legal and fits is there, in order, with what bounds it."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest

from megakor.config.checks import check_plan
from megakor.config.schema import ActivationCheckpointing, PlanSearchConfig
from megakor.plan.plan import Subject, make_plan
from megakor.plan.search import BOUNDS, KEYS, RECOMPUTED, Found, Layout, changed, mended, search, values
from tests.config.commands import quickly_composed

SMALL = ("model=1_3b", "cluster.gpus=8xa100-40g", "train.global_batch_size=64")


def searched(*arguments: str) -> tuple[PlanSearchConfig, Found]:
    config = quickly_composed("plan search", *arguments)
    return config, search(config, Subject.of(config))


@pytest.fixture(scope="module")
def small() -> Found:
    return searched(*SMALL)[1]


def as_planned(layout: Layout, *arguments: str) -> Any:
    return make_plan(
        quickly_composed("plan", *arguments, *(f"{key}={value}" for key, value in layout.overrides.items()))
    )


def test_fastest_first(small: Found) -> None:
    seconds = [layout.time.seconds for layout in small.layouts]
    assert len(seconds) > 20
    assert seconds == sorted(seconds)


def test_the_best_can_be_pasted(small: Found) -> None:
    """As overrides of a plan, and of a training run, whose rules are the same."""
    for layout in (small.layouts[0], small.layouts[-1]):
        plan = as_planned(layout, *SMALL)
        assert plan.dims == layout.dims
        assert plan.fits
        assert plan.time.seconds == pytest.approx(layout.time.seconds)
        assert plan.fullest == layout.memory


def test_each_legal_combination_of_sizes_is_there_or_does_not_fit(small: Found) -> None:
    """Against the rules and plans one by one, of all sizes of 8 ranks with micro-batches of 1."""
    names = KEYS[0], KEYS[1], KEYS[2], "parallel.zero_stage", "parallel.sequence_parallel"
    seen = {
        tuple(values(layout.parallel, layout.train)[name] for name in names)
        for layout in small.layouts if layout.train.micro_batch_size == 1
    }  # fmt: skip
    config, sizes = quickly_composed("plan", *SMALL), (1, 2, 4, 8)
    expected = set()
    for place in itertools.product(sizes, sizes, sizes, (1, 2, 3), (False, True)):
        if place[0] * place[1] * place[2] > 8:
            continue
        most = {"train.micro_batch_size": 1, "train.activation_checkpointing": ActivationCheckpointing.full}
        tried = changed(config, dict(zip(names, place, strict=True)) | most)
        try:
            check_plan(tried)
        except ValueError:
            continue
        if make_plan(tried).fits:
            expected.add(place)
    assert len(expected) > 15
    assert seen == expected


def test_no_more_is_recomputed_than_is_needed() -> None:
    _, found = searched("model=5_8b", "cluster.gpus=8xa100-40g", "train.global_batch_size=64")
    kinds = {layout.train.activation_checkpointing for layout in found.layouts}
    assert kinds == set(ActivationCheckpointing)
    base = quickly_composed("plan", "model=5_8b", "cluster.gpus=8xa100-40g", "train.global_batch_size=64")
    less = dict(itertools.pairwise(reversed(RECOMPUTED)))
    for layout in found.layouts:
        kind = layout.train.activation_checkpointing
        if kind in less:
            taken = values(layout.parallel, layout.train) | {"train.activation_checkpointing": less[kind]}
            assert not make_plan(changed(base, taken)).fits


def test_bounds(small: Found) -> None:
    assert {layout.bound for layout in small.layouts} <= {*BOUNDS.values(), "computation"}
    for layout in small.layouts:
        lost = [getattr(layout.time, name) for name in BOUNDS]
        assert (layout.bound == "computation") is (max(lost) <= 0.1 * layout.time.seconds)
    deep = [layout for layout in small.layouts if layout.dims.pipeline == 8 and layout.train.micro_batch_size == 16]
    assert {layout.bound for layout in deep} == {"pipeline bubble"}


def test_what_is_left_out_is_told(small: Found) -> None:
    assert small.left_out["parallel.zero_stage must be 1 with parallel.pipeline_parallel_size"] > 0
    assert all("=" not in reason for reason in small.left_out)
    _, large = searched("model=12_8b", "cluster.gpus=8xa100-40g", "train.global_batch_size=64")
    assert large.left_out["do not fit into memory"] > 0
    _, wide = searched("model=1_3b", "cluster.gpus=16xa100-40g", "train.global_batch_size=64")
    assert wide.left_out["tensor ranks must share a node of 8"] > 0


def test_256_accelerators_take_seconds() -> None:
    start = time.process_time()
    _, found = searched("experiment=12_8b_256xa100", "cluster.gpus=256xa100-80g")
    assert time.process_time() - start < 10
    best = found.layouts[0]
    written = make_plan(quickly_composed("plan", "experiment=12_8b_256xa100"))
    assert best.time.seconds <= written.time.seconds


def mend(*arguments: str) -> tuple[dict[str, str], Layout] | None:
    config = quickly_composed("plan", *arguments)
    assert not make_plan(config).fits
    return mended(config, Subject.of(config))


def test_one_key_is_changed_where_one_is_enough() -> None:
    found = mend("model=12_8b", "cluster.gpus=64xa100-80g", "train.global_batch_size=512")
    assert found is not None
    changes, layout = found
    assert len(changes) == 1
    words = [f"{key}={value}" for key, value in changes.items()]
    plan = make_plan(
        quickly_composed("plan", "model=12_8b", "cluster.gpus=64xa100-80g", "train.global_batch_size=512", *words)
    )
    assert plan.fits
    assert plan.fullest == layout.memory


def test_two_where_one_is_not() -> None:
    found = mend("model=12_8b", "cluster.gpus=8xa100-80g", "train.global_batch_size=512", "train.micro_batch_size=64")
    assert found is not None
    assert len(found[0]) == 2


def test_none_fits() -> None:
    assert mend("model=12_8b", "cluster.gpus=1xrtx-3090") is None
