"""A pass that would wait for the device is refused, with its line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megakor.config.schema import SimulateConfig
from megakor.model.layers import Norm
from megakor.parallel.tensor import ResidualNorm
from megakor.simulate.layout import simulate
from tests.simulate.test_layout import PIPELINE, layout

MARK = "# the line"


def source(function: Callable) -> list[str]:
    return inspect.getsource(function).splitlines()


def item(states: torch.Tensor) -> None:
    states.sum().item()  # the line


def condition(states: torch.Tensor) -> None:
    if states.sum() > 0:  # the line
        states = states + 1


def reading(states: torch.Tensor) -> None:
    states[states > 0]  # the line


def nonzero(states: torch.Tensor) -> None:
    states.nonzero()  # the line


def writing(states: torch.Tensor) -> None:
    changed = states.detach().clone()
    changed[changed > 0] = torch.zeros(7)  # the line


def filling(states: torch.Tensor) -> None:
    changed = states.detach().clone()
    changed[changed > 0] = 0.0
    changed.masked_fill_(changed < 0, 1.0)


def simulate_with(inject: Callable, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ResidualNorm.forward

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
            return states.view_as(states)

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            inject(gradient)
            return gradient

    def forward(self: Norm, hidden_states: torch.Tensor) -> torch.Tensor:
        if backward:
            return Identity.apply(real(self, hidden_states))
        inject(hidden_states)
        return real(self, hidden_states)

    monkeypatch.setattr(ResidualNorm, "forward", forward)
    simulate(SimulateConfig(**vars(layout(PIPELINE)), world_size=4))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("inject", [item, condition, reading, nonzero, writing], ids=lambda function: function.__name__)
def test_waiting_for_the_device_is_refused(inject: Callable, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="stage 0: .*must not depend on the values of a tensor") as error:
        simulate_with(inject, backward, monkeypatch)
    first = inject.__code__.co_firstlineno
    lines = [
        f"{__file__}:{first + offset} in {inject.__name__}: `"
        for offset, text in enumerate(source(inject))
        if MARK in text
    ]
    assert len(lines) == 1
    assert lines[0] in str(error.value)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_filling_waits_for_nothing(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_with(filling, backward, monkeypatch)


def test_a_refusal_leaves_no_group_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="stage 0"):
        simulate_with(item, False, monkeypatch)
    monkeypatch.undo()
    simulate(SimulateConfig(**vars(layout(PIPELINE)), world_size=4))
