from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megakor.config.schema import ScheduleConfig, ScheduleName
from megakor.train.schedule import learning_rate, learning_rate_ratio

share = st.floats(0, 1)
schedules = st.builds(
    ScheduleConfig,
    name=st.sampled_from(ScheduleName),
    warmup_ratio=share,
    decay_ratio=share,
    min_lr_ratio=share,
)


@given(schedules, share)
def test_ratios_are_ratios(schedule: ScheduleConfig, progress: float) -> None:
    assert 0.0 <= learning_rate_ratio(schedule, progress) <= 1.0 + 1e-12


@given(schedules, share, share)
def test_up_during_the_warm_up_and_never_up_again(schedule: ScheduleConfig, first: float, second: float) -> None:
    first, second = sorted((first, second))
    early, late = learning_rate_ratio(schedule, first), learning_rate_ratio(schedule, second)
    if second < schedule.warmup_ratio:
        assert early <= late
    if first >= schedule.warmup_ratio:
        assert late <= early + 1e-12
        assert late >= schedule.min_lr_ratio - 1e-12 or schedule.min_lr_ratio > 1


@given(schedules)
def test_the_warm_up_is_a_line_from_zero_to_the_peak(schedule: ScheduleConfig) -> None:
    assume(schedule.warmup_ratio > 1e-6)
    assert learning_rate_ratio(schedule, 0.0) == 0.0
    assert learning_rate_ratio(schedule, schedule.warmup_ratio / 2) == pytest.approx(0.5)
    assert learning_rate_ratio(schedule, schedule.warmup_ratio) == pytest.approx(1.0)


@given(schedules)
def test_where_it_ends(schedule: ScheduleConfig) -> None:
    assume(schedule.warmup_ratio < 0.99 and schedule.decay_ratio > 0.01)
    expected = 1.0 if schedule.name is ScheduleName.constant else schedule.min_lr_ratio
    assert learning_rate_ratio(schedule, 1.0) == pytest.approx(expected)


@given(schedules, share)
def test_no_jumps(schedule: ScheduleConfig, progress: float) -> None:
    assume(schedule.warmup_ratio > 0.05 and min(schedule.decay_ratio, 1 - schedule.warmup_ratio) > 0.05)
    step = 1e-6
    change = learning_rate_ratio(schedule, min(1.0, progress + step)) - learning_rate_ratio(schedule, progress)
    assert abs(change) <= 40 * step


def ratio(name: ScheduleName, progress: float, **changes: float) -> float:
    return learning_rate_ratio(ScheduleConfig(name, **{"warmup_ratio": 0.2, "min_lr_ratio": 0.1} | changes), progress)


def test_cosine() -> None:
    assert ratio(ScheduleName.cosine, 0.6) == pytest.approx(0.1 + 0.9 / 2)
    assert ratio(ScheduleName.cosine, 0.4) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_linear() -> None:
    assert ratio(ScheduleName.linear, 0.6) == pytest.approx(1 - 0.9 / 2)
    assert ratio(ScheduleName.linear, 0.4) == pytest.approx(1 - 0.9 / 4)


def test_constant() -> None:
    assert ratio(ScheduleName.constant, 0.1) == pytest.approx(0.5)
    assert ratio(ScheduleName.constant, 0.7) == ratio(ScheduleName.constant, 1.0) == 1.0


def test_warmup_stable_decay() -> None:
    assert ratio(ScheduleName.wsd, 0.3, decay_ratio=0.4) == ratio(ScheduleName.wsd, 0.59, decay_ratio=0.4) == 1.0
    assert ratio(ScheduleName.wsd, 0.8, decay_ratio=0.4) == pytest.approx(1 - 0.9 / 2)
    assert ratio(ScheduleName.wsd, 0.6, decay_ratio=1.0) == pytest.approx(1 - 0.9 / 2)  # it waits for the warm-up


def test_the_rate_of_a_step_is_that_of_the_progress_when_it_is_done() -> None:
    schedule = ScheduleConfig(ScheduleName.linear, warmup_ratio=0.2, min_lr_ratio=0.0)
    rates = [learning_rate(schedule, 2.0, step, 10) for step in range(10)]
    assert rates == pytest.approx([1.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_without_a_warm_up_the_first_step_is_near_the_peak() -> None:
    schedule = ScheduleConfig(ScheduleName.constant, warmup_ratio=0.0)
    assert [learning_rate(schedule, 3.0, step, 4) for step in range(4)] == [3.0] * 4
