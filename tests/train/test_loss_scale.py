"""Our part of the dynamic loss scale, against DeepSpeed's own scaler."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime.fp16 import loss_scaler as theirs
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from hypothesis import given
from hypothesis import strategies as st

from megakor.train.loss_scale import STATE, restore_scaler, scaler_state


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theirs, "dist", SimpleNamespace(get_rank=lambda: 1))  # it asks for the rank to log


def scaler(window: int = 4, shift: int = 1, consecutive: bool = False) -> DynamicLossScaler:
    return DynamicLossScaler(
        init_scale=2.0**16,
        scale_window=window,
        min_scale=1.0,
        delayed_shift=shift,
        consecutive_hysteresis=consecutive,
        raise_error_at_min_scale=False,
    )


def test_an_overflow_halves_and_a_window_doubles() -> None:
    dynamic = scaler(window=4)
    dynamic.update_scale(True)
    assert scaler_state(dynamic)["cur_scale"] == 2.0**15
    scales = []
    for _ in range(9):
        dynamic.update_scale(False)
        scales.append(scaler_state(dynamic)["cur_scale"] / 2.0**15)
    assert scales == [1, 1, 1, 1, 2, 2, 2, 2, 4]


@given(
    before=st.lists(st.booleans(), max_size=40),
    after=st.lists(st.booleans(), min_size=1, max_size=40),
    window=st.integers(1, 5),
    shift=st.integers(1, 3),
    consecutive=st.booleans(),
)
def test_a_restored_scaler_goes_on_alike(
    before: list[bool], after: list[bool], window: int, shift: int, consecutive: bool
) -> None:
    running, restored = scaler(window, shift, consecutive), scaler(window, shift, consecutive)
    for overflow in before:
        running.update_scale(overflow)
    restore_scaler(restored, json.loads(json.dumps(scaler_state(running))))  # as through a manifest
    for overflow in after:
        running.update_scale(overflow)
        restored.update_scale(overflow)
        assert vars(restored) == vars(running)


def test_the_state_is_all_that_changes() -> None:
    """Of DeepSpeed's scaler as it is installed: a new attribute that moves would be lost on resume."""
    moving: set[str] = set()
    for consecutive in (False, True):
        dynamic = scaler(window=2, shift=2, consecutive=consecutive)
        start = dict(vars(dynamic))
        for overflow in [True, True, False, False, False, True]:
            dynamic.update_scale(overflow)
            moving |= {name for name, value in vars(dynamic).items() if start[name] != value}
    assert moving == set(STATE)


@pytest.mark.parametrize("static", [None, LossScaler(1.0)])
def test_a_static_scale_has_no_state(static: Any) -> None:
    assert scaler_state(static) == {}
    restore_scaler(static, {})


def test_fp16_on_one_side_only_is_refused() -> None:
    state = scaler_state(scaler())
    with pytest.raises(ValueError, match=r"train\.precision must be fp16 on both sides"):
        restore_scaler(LossScaler(1.0), state)
    with pytest.raises(ValueError, match=r"train\.precision must be fp16 on both sides"):
        restore_scaler(scaler(), {})
