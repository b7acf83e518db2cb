from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megakor.config.schema import LoggingConfig, WandbMode
from megakor.train.metrics import Metrics, read_metrics
from megakor.train.spikes import CONSISTENCY, Spike, SpikeRule

Curve = list[tuple[int, float, float]]


def falling(seed: int, num_steps: int = 2000, noise: float = 0.02) -> Curve:
    """(step, loss, gradient norm) like a real run's: from ln(30,080) nats by a power law, with normal noise; the norm
    climbs in the warm-up of 1 % to several times what it settles at, with heavier-tailed noise."""
    random = np.random.default_rng(seed)
    steps = np.arange(1, num_steps + 1)
    loss = 2.2 + 8.1 * (1 + steps / 40) ** -0.7 + noise * random.standard_normal(num_steps)
    warmup = num_steps // 100
    norm = 0.4 + 4 * np.minimum(steps / warmup, np.exp(-(steps - warmup) / 150))
    norm *= np.exp(0.15 * random.standard_normal(num_steps))
    return list(zip(steps.tolist(), loss.tolist(), norm.tolist(), strict=True))


def spikes(rule: SpikeRule, curve: Curve) -> list[Spike]:
    return [spike for step in curve if (spike := rule.observe(*step)) is not None]


def test_no_false_alarm_on_falling_curves() -> None:
    for seed in range(20):
        assert spikes(SpikeRule(), falling(seed)) == [], seed


def test_a_tighter_rule_would_alarm_on_them() -> None:
    """The curves above are not so tame that any rule would be silent."""
    assert any(spikes(SpikeRule(threshold=3.0), falling(seed)) for seed in range(3))


@pytest.mark.parametrize("seed", range(5))
def test_one_nat_is_found_at_once(seed: int) -> None:
    curve = falling(seed)
    step, loss, grad_norm = curve[1199]
    curve[1199] = (step, loss + 1.0, grad_norm)
    (found,) = spikes(SpikeRule(), curve)
    assert (found.step, found.quantity, found.value) == (1200, "loss", loss + 1.0)
    assert abs(found.median - loss) < 0.2
    assert found.deviations > 10


def test_the_numbers_of_a_spike() -> None:
    """By hand: of 1, 2, 3, 4, 5 the median is 3 and the median absolute deviation 1."""
    rule = SpikeRule(window=5, threshold=2.0, min_history=5)
    for step in range(1, 6):
        assert rule.observe(step, float(step), 1.0) is None
    found = rule.observe(6, 6.0, 1.0)
    assert found == Spike(6, "loss", 6.0, 3.0, pytest.approx(3 / CONSISTENCY))
    assert str(found) == "step 6: loss 6 lies 2.0 deviations above the median 3"
    assert rule.observe(6, 3 + 1.99 * CONSISTENCY, 1.0) is None


def test_the_consistency_constant() -> None:
    values = np.random.default_rng(0).standard_normal(1_000_000)
    assert pytest.approx(1.0, abs=3e-3) == CONSISTENCY * np.median(np.abs(values - np.median(values)))


def test_gradient_norms_spike_too() -> None:
    rule = SpikeRule()
    assert spikes(rule, falling(0)) == []
    found = rule.observe(2001, 2.3, 20.0)
    assert found is not None
    assert found.quantity == "grad_norm"
    both = rule.observe(2001, 9.0, 20.0)
    assert both is not None
    assert both.quantity == "loss"


def test_gradient_norms_are_judged_by_their_ratio() -> None:
    """A norm of 2.3 × the median is within what sound runs have, however flat the curve; e is not."""
    rule = SpikeRule()
    for step in range(100):
        rule.observe(step, 3.0, 0.55)
    assert rule.observe(100, 3.0, 2.3 * 0.55) is None
    found = rule.observe(101, 3.0, 1.01 * math.e * 0.55)
    assert found is not None
    assert found.deviations == pytest.approx(10 + 10 * math.log(1.01))
    assert found.median == 0.55


def test_a_norm_of_nothing() -> None:
    rule = SpikeRule()
    for step in range(100):
        assert rule.observe(step, 3.0, 0.0) is None
    assert rule.observe(100, 3.0, 1.0) is not None


def test_a_long_spike_stays_one() -> None:
    """Its values are not taken for the new normal, however long it lasts; until the caller says so."""
    rule = SpikeRule()
    for step in range(200):
        rule.observe(step, 3.0, 1.0)
    assert all(rule.observe(step, 4.0, 1.0) is not None for step in range(200, 500))
    assert rule.observe(500, 3.0, 1.0) is None
    rule.forget(-1)
    assert all(rule.observe(step, 4.0, 1.0) is None for step in range(501, 600))


def test_a_flat_curve_does_not_alarm_on_its_last_digits() -> None:
    rule = SpikeRule()
    for step in range(100):
        rule.observe(step, 3.0, 1.0)
    assert rule.observe(100, 3.29, 1.0) is None
    assert rule.observe(101, 3.31, 1.0) is not None


def test_nothing_is_judged_before_there_is_a_history() -> None:
    rule = SpikeRule(min_history=32)
    for step in range(31):
        rule.observe(step, 3.0, 1.0)
    assert rule.observe(31, 300.0, 1.0) is None
    rule = SpikeRule(min_history=32)
    for step in range(32):
        rule.observe(step, 3.0, 1.0)
    assert rule.observe(32, 300.0, 1.0) is not None


@pytest.mark.parametrize(
    ("loss", "grad_norm", "quantity"),
    [(math.nan, 1.0, "loss"), (math.inf, 1.0, "loss"), (3.0, math.nan, "grad_norm"), (3.0, -1.0, "grad_norm")],
)
def test_what_is_not_finite_is_a_spike_from_the_first_step(loss: float, grad_norm: float, quantity: str) -> None:
    rule = SpikeRule()
    found = rule.observe(1, loss, grad_norm)
    assert found is not None
    assert (found.quantity, found.deviations) == (quantity, math.inf)
    assert str(found) == f"step 1: {quantity} is not finite"
    assert all(not values for values in rule.history.values())


def test_a_step_without_a_norm() -> None:
    rule = SpikeRule()
    for step in range(100):
        assert rule.observe(step, 3.0, None if step % 2 else 1.0) is None
    assert (len(rule.history["loss"]), len(rule.history["grad_norm"])) == (100, 50)


def test_forgetting_is_as_if_the_steps_had_not_been() -> None:
    curve = falling(1, num_steps=120)
    whole, rolled_back = SpikeRule(), SpikeRule()
    spikes(whole, curve[:90])
    spikes(rolled_back, curve)
    rolled_back.forget(90)
    assert rolled_back.history == whole.history


def test_a_refilled_rule_is_the_one_that_was(tmp_path: Path) -> None:
    """Through the file: with a spike, a roll-back that takes it and the steps before it out, and steps not finite."""
    curve = falling(2, num_steps=700)
    curve[650], curve[690] = (651, math.nan, math.nan), (691, math.nan, 1.0)
    curve[660] = (661, curve[660][1] + 2.0, curve[660][2])
    live = SpikeRule()
    quiet = LoggingConfig(wandb=WandbMode.disabled)
    with Metrics(tmp_path, "시험", quiet, {}, 1) as metrics:
        for first, last in ((0, 661), (640, 700)):
            live.forget(first)
            metrics.write("start", first)
            for step, loss, grad_norm in curve[first:last]:
                live.observe(step, loss, grad_norm)
                metrics.write("train", step, loss=loss, grad_norm=grad_norm)
            metrics.write("validation", last, set="heldout", loss=2.0)
    records: list[dict[str, Any]] = read_metrics(tmp_path)
    refilled = SpikeRule()
    refilled.refill(records)
    assert refilled.history == live.history
    assert 691 not in [step for step, _ in refilled.history["loss"]]
    assert 661 not in [step for step, _ in refilled.history["loss"]]
    assert len(refilled.history["loss"]) == 128


def test_refilling_starts_afresh() -> None:
    rule = SpikeRule()
    rule.observe(1, 9.0, 1.0)
    rule.refill([{"kind": "train", "step": 5, "loss": 3.0, "grad_norm": 1.0}])
    assert list(rule.history["loss"]) == [(5, 3.0)]


@pytest.mark.parametrize(
    "numbers", [{"window": 16}, {"min_history": 0}, {"threshold": 0.0}, {"threshold": math.nan}], ids=str
)
def test_numbers_that_make_no_rule_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        SpikeRule(**numbers)
