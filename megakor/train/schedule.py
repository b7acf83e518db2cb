"""The learning rate as a pure function of progress; it is never saved."""

from __future__ import annotations

import math

from megakor.config.schema import ScheduleConfig, ScheduleName


def learning_rate_ratio(schedule: ScheduleConfig, progress: float) -> float:
    """Rate over peak rate at `progress`, the share of the run that is done, in [0, 1].

    A linear warm-up from 0 precedes every shape. `cosine` and `linear` fall to `min_lr_ratio` over the rest,
    `constant` stays, `wsd` (warm-up, stable, decay; Hu et al. 2024, MiniCPM, section 4) falls linearly over the last
    `decay_ratio` of the run.
    """
    if progress < schedule.warmup_ratio:
        return progress / schedule.warmup_ratio
    floor = schedule.min_lr_ratio
    if schedule.name is ScheduleName.constant:
        return 1.0
    if schedule.name is ScheduleName.wsd:
        start = max(schedule.warmup_ratio, 1.0 - schedule.decay_ratio)
    else:
        start = schedule.warmup_ratio
    if progress <= start or start >= 1.0:
        return 1.0
    done = min(1.0, (progress - start) / (1.0 - start))
    if schedule.name is ScheduleName.cosine:
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0 - (1.0 - floor) * done


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, num_steps: int) -> float:
    """The rate of optimizer step `step` (counted from 0): that of the progress when the step is done."""
    return peak * learning_rate_ratio(schedule, (step + 1) / num_steps)
