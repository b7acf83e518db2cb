"""How a run walks along its stream: how many samples a step takes, how long its rows are, and what is left out.

    positions of the stream   0 1 2 3 4 5 6 7 8 9 …        without the skipped ones, they are
    samples of the run        0 1 2 3 . . 4 5 6 7 …        which steps take in turn
    steps                     └0┘ └1┘     └──2──┘ …

Each of these follows from the numbers of a few phases, so a step is entered without those before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Step:
    """What a step takes.

    Attributes:
        start: samples of the run before it.
        size: samples that it takes.
        sequence_length: tokens of the rows that its samples are cut into.
    """

    start: int
    size: int
    sequence_length: int


@dataclass(frozen=True)
class Phase:
    """Steps of one size, from a step and a sample on."""

    step: int
    sample: int
    size: int


class Plan:
    """The steps of a run.

    Args:
        global_batch_size: samples of a step.
        sequence_length: tokens of a sample.
        batch_sizes: other sizes before that: each holds for the steps that begin before its key, a number of samples.
        sequence_lengths: lengths of rows before that of a sample, in the same way; each divides it. The tokens of a
            step are the same, in the same order, in more and shorter rows.
        skip: stretches of the stream that are left out: first position, and the one after the last.

    Raises:
        ValueError: a size below 1, a length that does not divide, or stretches that are empty or overlap.
    """

    def __init__(
        self,
        global_batch_size: int,
        sequence_length: int,
        batch_sizes: Mapping[int, int] | None = None,
        sequence_lengths: Mapping[int, int] | None = None,
        skip: Sequence[Sequence[int]] = (),
    ) -> None:
        self.global_batch_size, self.sequence_length = global_batch_size, sequence_length
        self.batch_sizes, self.sequence_lengths = dict(batch_sizes or {}), dict(sequence_lengths or {})
        self.skip = sorted((int(start), int(stop)) for start, stop in skip)
        self._check()
        self._phases = self._phases_of_sizes()
        starts, stops = (np.array([window[end] for window in self.skip], dtype=np.int64) for end in (0, 1))
        self._skipped = np.concatenate([[0], np.cumsum(stops - starts)])  # before and with each window
        self._windows = starts - self._skipped[:-1]  # samples of the run before each window

    def step(self, number: int) -> Step:
        """Step `number`, from 0."""
        phase = next(phase for phase in reversed(self._phases) if phase.step <= number)
        start = phase.sample + (number - phase.step) * phase.size
        return Step(start, phase.size, self._length(start))

    def num_tokens(self, step: int) -> int:
        """Tokens of a step, those that fill rows up included."""
        return self.step(step).size * self.sequence_length

    def num_tokens_before(self, step: int) -> int:
        """Tokens of all steps before."""
        return self.step(step).start * self.sequence_length

    def step_of(self, sample: int) -> int:
        """The step that takes a sample of the run."""
        phase = next(phase for phase in reversed(self._phases) if phase.sample <= sample)
        return phase.step + (sample - phase.sample) // phase.size

    def positions(self, samples: np.ndarray) -> np.ndarray:
        """Where samples of the run are in the stream: int64 [n]."""
        return samples + self._skipped[np.searchsorted(self._windows, samples, side="right")]

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Which samples of the run positions of the stream are: int64 [n]; -1 for those that are left out."""
        starts, stops = (np.array([window[end] for window in self.skip], dtype=np.int64) for end in (0, 1))
        before = np.searchsorted(starts, positions, side="right")  # windows that begin at or before each
        left_out = positions < np.concatenate([[0], stops])[before]
        return np.where(left_out, -1, positions - self._skipped[before])

    def end_of(self, step: int) -> int:
        """The position of the stream after the last that a step before `step` takes."""
        start = self.step(step).start
        return int(self.positions(np.array([start - 1]))[0]) + 1 if start else 0

    def state(self, step: int) -> dict[str, Any]:
        """What the steps before `step` depend on, by configuration key."""
        sizes = [[phase.sample, phase.size] for phase in self._phases if phase.step < max(step, 1)]
        begun = self.step(step - 1).start if step else 0
        firsts = [0, *(until for until in sorted(self.sequence_lengths) if until <= begun)]
        lengths = [[first, self._length(first)] for first in firsts]
        return {
            "train.global_batch_size": sizes[0][1] if len(sizes) == 1 else sizes,
            "train.sequence_lengths": lengths if any(size != self.sequence_length for _, size in lengths) else [],
            "data.skip": [list(window) for window in self.skip if window[1] <= self.end_of(step)],
        }

    def _length(self, sample: int) -> int:
        """Of the rows of the steps that begin at a sample."""
        length = next((size for until, size in sorted(self.sequence_lengths.items()) if sample < until), None)
        return length or self.sequence_length

    def _check(self) -> None:
        for key, value in {
            "train.global_batch_size": self.global_batch_size,
            "train.sequence_length": self.sequence_length,
            **{f"train.batch_sizes.{until}": size for until, size in self.batch_sizes.items()},
            **{f"train.sequence_lengths.{until}": length for until, length in self.sequence_lengths.items()},
        }.items():
            if value < 1:
                raise ValueError(f"{key}={value} must be at least 1")
        for until, length in self.sequence_lengths.items():
            if self.sequence_length % length:
                raise ValueError(
                    f"train.sequence_lengths.{until}={length} must divide train.sequence_length={self.sequence_length}"
                )
        end = 0
        for start, stop in self.skip:
            if not end <= start < stop:
                raise ValueError(
                    f"data.skip={[list(window) for window in self.skip]} must be stretches of at least one sample "
                    f"that do not overlap, and [{start}, {stop}] is none after {end}"
                )
            end = stop

    def _phases_of_sizes(self) -> list[Phase]:
        phases, step, sample = [], 0, 0
        for until, size in sorted(self.batch_sizes.items()):
            if until > sample:
                phases.append(Phase(step, sample, size))
                num_steps = -(-(until - sample) // size)
                step, sample = step + num_steps, sample + num_steps * size
        return [*phases, Phase(step, sample, self.global_batch_size)]
