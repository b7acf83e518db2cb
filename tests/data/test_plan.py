from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakor.data.plan import Plan

sizes = st.dictionaries(st.integers(1, 500), st.integers(1, 40), max_size=4)
windows = st.lists(st.integers(0, 300), max_size=6, unique=True).map(
    lambda ends: (
        list(itertools.batched(sorted(ends)[: len(ends) // 2 * 2], 2))
        if hasattr(itertools, "batched")
        else list(zip(sorted(ends)[0::2], sorted(ends)[1::2], strict=False))
    )
)


@settings(deadline=None)
@given(st.integers(1, 40), sizes)
def test_steps_follow_each_other(size: int, phases: dict[int, int]) -> None:
    """Every sample is in one step; a size holds for the steps that begin before its end."""
    plan, sample = Plan(size, 8, phases), 0
    for number in range(80):
        step = plan.step(number)
        assert step.start == sample
        assert step.size == next((size for until, size in sorted(phases.items()) if sample < until), size)
        assert {plan.step_of(sample), plan.step_of(sample + step.size - 1)} == {number}
        sample += step.size


@settings(deadline=None)
@given(windows)
def test_skipped_stretches(skip: list[tuple[int, int]]) -> None:
    plan = Plan(4, 8, skip=skip)
    left = [position for position in range(600) if not any(start <= position < stop for start, stop in skip)]
    assert plan.positions(np.arange(len(left))).tolist() == left
    expected = {position: sample for sample, position in enumerate(left)}
    assert plan.samples(np.arange(600)).tolist() == [expected.get(position, -1) for position in range(600)]


def test_lengths() -> None:
    plan = Plan(4, 16, sequence_lengths={8: 4, 12: 8})
    assert [plan.step(number).sequence_length for number in range(5)] == [4, 4, 8, 16, 16]


def test_state_is_of_the_past() -> None:
    """What is to come may change, what has been may not."""
    plan = Plan(8, 16, {16: 4}, {16: 8}, [[20, 24], [100, 110]])
    assert plan.state(3) == {"train.global_batch_size": 4, "train.sequence_lengths": [[0, 8]], "data.skip": []}
    assert plan.state(5) == {
        "train.global_batch_size": [[0, 4], [16, 8]],
        "train.sequence_lengths": [[0, 8], [16, 16]],
        "data.skip": [[20, 24]],
    }
    for changed in (
        Plan(32, 16, {16: 4, 48: 8}, {16: 8}, [[20, 24], [100, 110]]),  # grows later on
        Plan(8, 16, {16: 4}, {16: 8}, [[20, 24]]),
        Plan(8, 16, {16: 4}, {16: 8}, [[20, 24], [60, 70]]),
    ):
        assert changed.state(5) == plan.state(5)
    for changed in (Plan(8, 16, {20: 4}, {16: 8}, [[20, 24]]), Plan(8, 16, {16: 4}, {}, [[20, 24]]),
                    Plan(8, 16, {16: 4}, {16: 8}, [[20, 25]])):  # fmt: skip
        assert changed.state(5) != plan.state(5)


@pytest.mark.parametrize(("arguments", "message"), [
    ((0, 8), r"train\.global_batch_size=0 must be at least 1"),
    ((4, 8, {5: 0}), r"train\.batch_sizes\.5=0 must be at least 1"),
    ((4, 8, {}, {5: 3}), r"train\.sequence_lengths\.5=3 must divide train\.sequence_length=8"),
    ((4, 8, {}, {}, [[3, 3]]), r"data\.skip=.*at least one sample"),
    ((4, 8, {}, {}, [[3, 9], [5, 12]]), r"data\.skip=.*do not overlap, and \[5, 12\] is none after 9"),
])  # fmt: skip
def test_bad_plans(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(*arguments)
