"""When a loss or a gradient norm is a spike: a robust rule over the steps before it. Pure and deterministic.

Other trainers keep a mean and a standard deviation, which a spike itself raises, or a fixed factor, which must be
found anew for each model. Here a step is judged by the median of the accepted steps before it and by the median
absolute deviation from it, which half of the window may not move.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONSISTENCY = 1.4826
"""Makes the median absolute deviation of normally distributed values their standard deviation: 1 / Φ⁻¹(3/4).

Rousseeuw and Croux, "Alternatives to the Median Absolute Deviation", JASA 88 (1993), section 1.
"""

LOSS_FLOOR, NORM_FLOOR = 0.01, 0.1
"""The deviation is at least this part of the median, so that a flat curve does not alarm on its last digits.

Gradient norms of sound runs reach far: 2.3 × the median in demo runs of 425 steps, where the deviation was about 10 %.
"""

REPLAYED_WINDOWS = 4
"""Records that `refill` reads, in windows: as many as fill one, however many spikes and roll-backs lie among them."""


@dataclass(frozen=True)
class Spike:
    """A step that is out of line.

    Attributes:
        step: its number.
        quantity: `loss` or `grad_norm`.
        value: what it was; NaN or infinite where the step has overflowed.
        median: of the accepted values before; NaN where there are none.
        deviations: how many robust standard deviations the value lies above the median; infinite where it is not
            finite.
    """

    step: int
    quantity: str
    value: float
    median: float
    deviations: float

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return f"step {self.step}: {self.quantity} is not finite"
        return (
            f"step {self.step}: {self.quantity} {self.value:.4g} lies {self.deviations:.1f} deviations above the "
            f"median {self.median:.4g}"
        )


def deviations_above(value: float, before: Sequence[float], floor: float) -> float:
    """How many robust standard deviations, of at least `floor` each, a value lies above the median of those before."""
    median = statistics.median(before)
    spread = CONSISTENCY * statistics.median(abs(earlier - median) for earlier in before)
    return (value - median) / max(spread, floor, sys.float_info.min)


def logarithm(norm: float) -> float:
    """Of a gradient norm, which is 0 where a step had no token to learn from."""
    return math.log(max(norm, sys.float_info.min))


class SpikeRule:
    """Tells spikes from the loss and the gradient norm of each step.

    A value is a spike when it lies above the median of the last `window` accepted values by more than `threshold` ×
    1.4826 × their median absolute deviation. Values below the median never are: falling is what a loss is for. Losses
    are judged as they are, gradient norms by their logarithms, as their noise multiplies. Every rank that observes the
    same values comes to the same verdicts, so none need be exchanged.

    A spike's values are not taken into the history. After a lasting change of level (another mixture, another sequence
    length) every step is a spike until the caller accepts the level by `forget(-1)`, which empties the history.

    Args:
        window: accepted values to judge by.
        threshold: robust standard deviations above the median that are still in line.
        min_history: accepted values before anything finite is judged.

    Raises:
        ValueError: a number that makes no rule.
    """

    def __init__(self, window: int = 128, threshold: float = 10.0, min_history: int = 32) -> None:
        if not 1 <= min_history <= window:
            raise ValueError(f"min_history={min_history} must be at least 1 and at most window={window}")
        if not threshold > 0:
            raise ValueError(f"threshold={threshold} must be above 0")
        self.window, self.threshold, self.min_history = window, threshold, min_history
        self.history: dict[str, deque[tuple[int, float]]] = {
            "loss": deque(maxlen=window), "grad_norm": deque(maxlen=window),
        }  # fmt: skip

    def observe(self, step: int, loss: float, grad_norm: float | None) -> Spike | None:
        """Judge a step and, if it is in line, remember it.

        Args:
            step: its number; above all remembered ones (see `forget`).
            loss: in nats per token. NaN or infinite is a spike, whatever came before.
            grad_norm: before clipping. Not finite is a spike, and so is one below 0: DeepSpeed gives -1 for gradients
                that are not finite. None: the step has none, as where fp16's loss scaler has skipped the update.

        Returns:
            The spike; that of the loss where both are.
        """
        values = {"loss": loss} if grad_norm is None else {"loss": loss, "grad_norm": grad_norm}
        for quantity, value in values.items():
            spike = self._judge(step, quantity, value)
            if spike is not None:
                return spike
        for quantity, value in values.items():
            self.history[quantity].append((step, value))
        return None

    def _judge(self, step: int, quantity: str, value: float) -> Spike | None:
        before = [earlier for _, earlier in self.history[quantity]]
        median = statistics.median(before) if before else math.nan
        if not math.isfinite(value) or (quantity == "grad_norm" and value < 0):
            return Spike(step, quantity, value if value >= 0 else math.nan, median, math.inf)
        if len(before) < self.min_history or value <= median:
            return None
        if quantity == "loss":
            deviations = deviations_above(value, before, LOSS_FLOOR * abs(median))
        else:
            deviations = deviations_above(logarithm(value), [logarithm(norm) for norm in before], NORM_FLOOR)
        return Spike(step, quantity, value, median, deviations) if deviations > self.threshold else None

    def forget(self, step: int) -> None:
        """Drop what was remembered of later steps than this one: the run goes on from here, as after a roll-back.

        What the window had lost before does not come back; where that leaves too little, `refill` does.
        """
        for quantity, values in self.history.items():
            kept = [(number, value) for number, value in values if number <= step]
            self.history[quantity] = deque(kept, maxlen=self.window)

    def refill(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Start afresh from a run's records, as `megakor.train.metrics.read_metrics` gives them.

        The last train records are observed again in their order, and a step that is not above its forerunner is taken
        for a roll-back to the step before it, so the history becomes what it was in the run, if that logged every
        step. A loss or gradient norm that is None was not finite. A caller that resumes at step k calls `forget(k)`
        next.
        """
        self.forget(-1)
        trained = [record for record in records if record["kind"] == "train"]
        for record in trained[-REPLAYED_WINDOWS * self.window :]:
            self.forget(record["step"] - 1)
            loss, grad_norm = record["loss"], record["grad_norm"]
            self.observe(
                record["step"], math.nan if loss is None else loss, math.nan if grad_norm is None else grad_norm
            )
