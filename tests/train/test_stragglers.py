from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from megakor.train import stragglers
from megakor.train.stragglers import ForwardTimes, spread
from tests.ranks import run_ranks


class Clock:
    """A host's clock that only blocks move."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stragglers, "time", clock)
    return clock


class Block(nn.Module):
    """Takes one second of a clock; it counts its passes."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.linear, self.clock, self.passes = nn.Linear(4, 4), clock, 0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        self.clock.now += 1
        return self.linear(hidden_states)


class Model(nn.Module):
    """Two blocks that are recomputed in the backward pass; it can call itself."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(clock) for _ in range(2))

    def forward(self, hidden_states: torch.Tensor, again: bool = False) -> torch.Tensor:
        if again:
            hidden_states = self(self.blocks[0](hidden_states))
        for block in self.blocks:
            hidden_states = checkpoint(block, hidden_states, use_reentrant=False)
        return hidden_states


def batch() -> torch.Tensor:
    return torch.ones(1, 4)


def test_the_passes_of_a_step_add_up_and_recomputation_does_not(clock: Clock) -> None:
    model = Model(clock)
    times = ForwardTimes(model)
    for _ in range(3):
        model(batch()).sum().backward()
    assert model.blocks[0].passes == 6  # each was recomputed
    assert times.take() == 6.0
    assert times.take() == 0.0


def test_a_pass_within_a_pass_counts_once(clock: Clock) -> None:
    model = Model(clock)
    times = ForwardTimes(model)
    model(batch(), again=True)
    assert times.take() == 5.0


def test_evaluation_does_not_count(clock: Clock) -> None:
    model = Model(clock).eval()
    times = ForwardTimes(model)
    model(batch())
    assert times.take() == 0.0
    model.train()(batch())
    assert times.take() == 2.0


def test_a_pass_that_fails_leaves_nothing_behind(clock: Clock) -> None:
    model = Model(clock)
    times = ForwardTimes(model)
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.ones(1, 5))
    assert times.take() == 1.0
    clock.now += 50
    model(batch())
    assert times.take() == 2.0


def test_a_closed_one_counts_no_more(clock: Clock) -> None:
    model = Model(clock)
    times = ForwardTimes(model)
    times.close()
    model(batch())
    assert times.take() == 0.0


class Device:
    """An accelerator whose device is behind its host: an event has its time once it has been waited for."""

    def __init__(self) -> None:
        self.now, self.recorded, self.waited = 0.0, 0, 0

    def Event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.number, self.time = self.device.recorded, self.device.now
        self.device.recorded += 1

    def synchronize(self) -> None:
        self.device.waited = self.number

    def elapsed_time(self, end: Event) -> float:
        assert self.device.waited >= end.number, "the device is not so far"
        return end.time - self.time


def test_an_accelerator_is_read_at_the_end_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(stragglers, "is_cpu", lambda: False)
    monkeypatch.setattr(stragglers, "get_accelerator", lambda: device)

    class Ticking(nn.Module):
        def forward(self, milliseconds: float) -> None:
            device.now += milliseconds

    model = Ticking()
    times = ForwardTimes(model)
    for milliseconds in (5.0, 7.0):
        model(milliseconds)
        device.now += 1000  # the backward pass
    assert (device.recorded, device.waited) == (4, 0)
    assert times.take() == pytest.approx(0.012)
    assert times.take() == 0.0
    model(3.0)
    assert times.take() == pytest.approx(0.003)


def test_spread() -> None:
    assert spread([0.5, 0.4, 0.9, 0.6]) == {
        "forward_seconds_min": 0.4,
        "forward_seconds_median": pytest.approx(0.55),
        "forward_seconds_max": 0.9,
        "slowest_rank": 2,
    }
    assert spread([0.3])["slowest_rank"] == 0


class Sleepy(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        time.sleep(0.4 if dist.get_rank() == 1 else 0.01)
        return weight * 2


def step_of_all() -> dict[str, Any]:
    """A step in which rank 1 is slow, and the others wait for its gradients."""
    model, weight = Sleepy(), torch.ones(4, requires_grad=True)
    times = ForwardTimes(model)
    model(weight).sum().backward()
    dist.all_reduce(weight.grad)
    everyone = [0.0] * dist.get_world_size()
    dist.all_gather_object(everyone, times.take())
    return spread(everyone)


def test_the_slow_rank_is_found_though_all_wait_for_it() -> None:
    for found in run_ranks(step_of_all, 3):
        assert found["slowest_rank"] == 1
        assert found["forward_seconds_min"] >= 0.01
        assert found["forward_seconds_max"] >= 0.4
        assert found["forward_seconds_median"] < found["forward_seconds_max"]
