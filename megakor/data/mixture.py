"""Several sources as one stream: which source each position comes from, and which of the source's positions it is.

The stream is a row of blocks. Before a block at position x, a source of weight w has been drawn from floor(w × x)
times, and the one with the largest weight as often as is left: shares are exact to one sample for each source at every
block's border, and any block is entered without those before it. Within a block the order of sources is a permutation
keyed by the block. Weights change at the first border at or after a stated position, and when a source has been read
as often as it may be; every such border begins a phase, and a phase counts on from where the one before has left each
source.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from megakor.data.permutation import child_keys, permute, root_keys

SMALLEST_BLOCK = 64


@dataclass(frozen=True)
class Share:
    """A source's part in a mixture.

    Attributes:
        name: of the source.
        num_samples: of one reading of it.
        max_epochs: readings after which it is drawn from no more; None: no limit.
    """

    name: str
    num_samples: int
    max_epochs: int | None = None

    @property
    def limit(self) -> int | None:
        return None if self.max_epochs is None else self.num_samples * self.max_epochs


@dataclass(frozen=True)
class Phase:
    """A stretch of the stream with the same weights.

    Attributes:
        start: its first position, a block's border.
        weights: of the sources; their sum is 1.
        drawn: from each source before `start`.
    """

    start: int
    weights: tuple[Fraction, ...]
    drawn: tuple[int, ...]

    def quotas(self, position: int) -> list[int]:
        """How often each source has been drawn from before `position` of the stream."""
        length = position - self.start
        found = [math.floor(weight * length) for weight in self.weights]
        found[self.weights.index(max(self.weights))] += length - sum(found)
        return [drawn + count for drawn, count in zip(self.drawn, found, strict=True)]


class Mixture:
    """The order in which sources take turns.

    Args:
        sources: what is mixed.
        curriculum: weights by the position from which they hold; the first at 0.
        seed: of the run.

    Attributes:
        block: positions of a block; more for more sources.

    Raises:
        ValueError: weights that are negative or all 0.
    """

    def __init__(
        self, sources: Sequence[Share], curriculum: Mapping[int, Sequence[float | Fraction]], seed: int
    ) -> None:
        self.sources = tuple(sources)
        # The largest weight is at least 1 / n, and must have room in a block for the rounding of n - 1 others.
        self.block = max(SMALLEST_BLOCK, 1 << (2 * len(self.sources) ** 2 - 1).bit_length())
        self._keys = root_keys(f"megakor mixture seed {seed}")
        self.phases = self._phases({start: self._shares(weights) for start, weights in sorted(curriculum.items())})

    def state(self, before: int | None = None) -> list[list[Any]]:
        """What the order of sources before a position depends on: each phase's first position and its shares.

        Args:
            before: None: all of it.
        """
        names = [share.name for share in self.sources]
        return [
            [phase.start, dict(zip(names, map(str, phase.weights), strict=True))]
            for phase in self.phases
            if before is None or phase.start < max(before, 1)
        ]

    @property
    def end(self) -> int | None:
        """Where every source with a weight has been read as often as it may be; None: the stream is endless."""
        return None if any(self.phases[-1].weights) else self.phases[-1].start

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each position's source and the position in it: int64 [n] each. ValueError past the end."""
        positions = np.asarray(positions, dtype=np.int64)
        if self.end is not None and len(positions) and positions.max() >= self.end:
            raise ValueError(f"position {positions.max()} must be below {self.end}, where all sources have been read")
        if len(self.sources) == 1:
            return np.zeros_like(positions), positions
        chosen, places = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(positions // self.block):
            here = positions // self.block == block
            sources, numbers = self._block(int(block))
            chosen[here], places[here] = sources[positions[here] % self.block], numbers[positions[here] % self.block]
        return chosen, places

    def drawn(self, position: int) -> list[int]:
        """How often each source has been drawn from, at most, before the end of the block that a position is in."""
        end = -(-position // self.block) * self.block
        if self.end is not None:
            end = min(end, self.end)
        return next(phase for phase in reversed(self.phases) if phase.start <= max(end - 1, 0)).quotas(end)

    def positions(self, source: int, numbers: np.ndarray) -> np.ndarray:
        """Where a source's positions come in the stream: int64 [n]; -1 for those that never come."""
        return np.array([self._position(source, int(number)) for number in numbers], dtype=np.int64)

    def _position(self, source: int, number: int) -> int:
        phase = next(phase for phase in reversed(self.phases) if phase.drawn[source] <= number)
        following = self.phases[self.phases.index(phase) + 1 :]
        if not phase.weights[source]:
            return -1
        # After x positions of a phase a source has been drawn from weight × x times, less than one fewer and at most as
        # many more as there are other sources: that leaves a few blocks to look at.
        ahead, per_block = number - phase.drawn[source], phase.weights[source] * self.block
        first = max(0, math.floor((ahead - len(self.sources)) / per_block))
        blocks = range(first, math.ceil((ahead + 1) / per_block) + 1)
        found = bisect.bisect_right(
            blocks, number, key=lambda block: phase.quotas(phase.start + block * self.block)[source]
        )
        block = blocks[found - 1] + phase.start // self.block
        if following and block * self.block >= following[0].start:
            return -1
        sources, numbers = self._block(block)
        return block * self.block + int(np.flatnonzero((sources == source) & (numbers == number))[0])

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources of a block's positions and the positions in them: int64 [self.block] each."""
        start = block * self.block
        phase = next(phase for phase in reversed(self.phases) if phase.start <= start)
        before, after = phase.quotas(start), phase.quotas(start + self.block)
        counts = [stop - first for first, stop in zip(before, after, strict=True)]
        sources = np.repeat(np.arange(len(counts)), counts)
        numbers = np.concatenate([np.arange(first, stop) for first, stop in zip(before, after, strict=True)])
        turns = permute(np.arange(self.block), np.array(self.block), child_keys(self._keys[None], np.array([block])))
        # A source's samples keep their order: what is permuted is whose turn it is.
        order = np.argsort(sources[turns], kind="stable")
        mixed = np.empty_like(numbers)
        mixed[order] = numbers
        return sources[turns], mixed

    def _shares(self, weights: Sequence[float | Fraction]) -> tuple[Fraction, ...]:
        """Weights as parts of their sum, as exact as they were written."""
        exact = [Fraction(str(weight)) if isinstance(weight, float) else Fraction(weight) for weight in weights]
        if len(exact) != len(self.sources) or min(exact) < 0 or not any(exact):
            raise ValueError(f"weights={list(weights)} must be one for each source, not negative, and not all 0")
        return tuple(weight / sum(exact) for weight in exact)

    def _phases(self, curriculum: dict[int, tuple[Fraction, ...]]) -> list[Phase]:
        """The curriculum's phases, cut where a source is used up."""
        phases: list[Phase] = []
        starts = [-(-start // self.block) * self.block for start in curriculum]
        if not starts or starts[0]:
            raise ValueError("the first weights must hold from position 0")
        drawn = [0] * len(self.sources)
        for number, wanted in enumerate(curriculum.values()):
            start, stop = starts[number], starts[number + 1] if number + 1 < len(starts) else None
            while stop is None or start < stop:
                phase = Phase(start, self._open(wanted, drawn), tuple(drawn))
                phases.append(phase)
                end = min((found for found in (self._used_up(phase), stop) if found is not None), default=None)
                if end is None or not any(phase.weights):
                    return phases
                drawn, start = phase.quotas(end), end
        return phases

    def _open(self, wanted: tuple[Fraction, ...], drawn: list[int]) -> tuple[Fraction, ...]:
        """The weights of the sources from which a block can still be drawn, as parts of their sum; all 0: of none."""
        left = wanted
        while any(left):
            parts = tuple(weight / sum(left) for weight in left)
            lasting = [
                share.limit is None or share.limit - count >= weight * self.block + len(self.sources)
                for weight, share, count in zip(parts, self.sources, drawn, strict=True)
            ]
            left = tuple(weight if lasts else Fraction(0) for weight, lasts in zip(parts, lasting, strict=True))
            if left == parts:
                break
        return left

    def _used_up(self, phase: Phase) -> int | None:
        """The border of the first block, from the phase's start on, that a source has too few samples for."""
        found = []
        for index, (weight, share) in enumerate(zip(phase.weights, self.sources, strict=True)):
            if weight and share.limit is not None:
                left = share.limit - phase.drawn[index] + len(self.sources)
                blocks = int(left / weight) // self.block + 1  # one too many
                while phase.quotas(phase.start + blocks * self.block)[index] > share.limit:
                    blocks -= 1
                found.append(phase.start + blocks * self.block)
        return min(found) if found else None
