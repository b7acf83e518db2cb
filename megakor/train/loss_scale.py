"""The dynamic loss scale of fp16 training, which affects the next step and is therefore saved.

DeepSpeed scales the loss, unscales the gradients, skips a step whose gradients overflow and halves the scale, and
doubles it after a window without overflow (Micikevicius et al. 2018, section 3.2).
"""

from __future__ import annotations

from typing import Any

STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Attributes of DeepSpeed's `DynamicLossScaler` that change as it runs."""


def scaler_state(scaler: Any) -> dict[str, float]:
    """What a DeepSpeed loss scaler needs to go on; empty for the static scale of bf16 and fp32."""
    if scaler is None or not getattr(scaler, "dynamic", False):
        return {}
    return {name: getattr(scaler, name) for name in STATE}


def restore_scaler(scaler: Any, state: dict[str, float]) -> None:
    """Put a loss scaler where a checkpoint left it.

    Raises:
        ValueError: the checkpoint's run had a dynamic loss scale and this one has none, or the other way round.
    """
    current = scaler_state(scaler)
    if current.keys() != state.keys():
        raise ValueError(
            f"train.precision must be fp16 on both sides of a resume or on neither: the checkpoint's loss scale is "
            f"{state or 'static'}, this run's {current or 'static'}"
        )
    for name, value in state.items():
        setattr(scaler, name, value)
