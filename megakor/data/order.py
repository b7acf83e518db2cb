"""The order of a source's samples: a pure function of (order version, seed, source, position), entered anywhere.

Position p of the endless stream belongs to epoch p // num_samples; every epoch has every sample once.

    shards, permuted for the epoch and laid end to end:   s5 s0 s7 | s1 s3 s6 | s4 s2      one line of samples
    cut into canonical streams of equal length:           stream 0 | stream 1 | stream 2
    each stream cut into windows, samples permuted within a window
    position p of the epoch:                               the (p // streams)-th of a stream; streams take turns in an
                                                           order of the epoch's, each round from another one on

A node that takes whole streams of a batch thus reads its own shards alone, a window's at a time, and another number of
nodes takes other streams of the same batch. Only a shard that lies across the border of two streams is read by both.
What is held is one number for each shard; no permutation of samples is.

These numbers are part of every checkpoint's meaning: they may change only together with ORDER_VERSION.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megakor.data.permutation import MAX_SIZE, child_keys, permutation, permute, root_keys, unpermute

ORDER_VERSION = 2


@dataclass(frozen=True)
class Places:
    """Where samples are; all int64 [n].

    Attributes:
        epochs: how often the source had been read through before.
        shards: number of the shard in the source's manifest.
        samples: number of the sample in its shard.
        streams: canonical stream.
    """

    epochs: np.ndarray
    shards: np.ndarray
    samples: np.ndarray
    streams: np.ndarray


class SourceOrder:
    """The order of one source.

    Args:
        samples_of_shards: [num_shards].
        seed: of the run.
        name: of the source: sources of one run are shuffled differently.
        num_streams: canonical streams, at most; numbers of nodes that divide it share the reading evenly.
        window: samples that are shuffled among each other, about.
    """

    def __init__(
        self, samples_of_shards: np.ndarray, *, seed: int, name: str = "", num_streams: int = 1, window: int = 1 << 16
    ) -> None:
        self.samples_of_shards = np.asarray(samples_of_shards, dtype=np.int64)
        self.num_samples = int(self.samples_of_shards.sum())
        if not 1 <= self.num_samples <= MAX_SIZE:
            raise ValueError(f"num_samples={self.num_samples} must be in 1 … {MAX_SIZE}")
        for key, value in {"num_streams": num_streams, "window": window}.items():
            if value < 1:
                raise ValueError(f"{key}={value} must be at least 1")
        self.num_streams, self.window = min(num_streams, self.num_samples), window
        self._identity = f"megakor order {ORDER_VERSION} seed {seed} source {name}"
        self._keys = root_keys(f"{self._identity} samples")
        self._round_keys = root_keys(f"{self._identity} rounds")[:1]
        self._line = lru_cache(maxsize=4)(self._line_of_epoch)
        self._ring = lru_cache(maxsize=4)(self._ring_of_epoch)

    def at(self, positions: np.ndarray) -> Places:
        """The samples at positions of the endless stream, int64 [n], each at least 0."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.num_samples)
        numbers, turns = np.divmod(places, self.num_streams)
        streams = self._streams(epochs, numbers, turns)
        first, sizes, keys = self._windows(epochs, streams, numbers)
        lines = self._starts(streams) + first + permute(numbers - first, sizes, keys)
        shards, samples = np.empty_like(lines), np.empty_like(lines)
        for epoch in np.unique(epochs):
            shuffled, starts = self._line(int(epoch))
            here = epochs == epoch
            slots = np.searchsorted(starts, lines[here], side="right") - 1
            shards[here], samples[here] = shuffled[slots], lines[here] - starts[slots]
        return Places(epochs, shards, samples, streams)

    def positions(self, epochs: np.ndarray, shards: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Where samples come in the endless stream: the inverse of `at`, int64 [n]."""
        lines = np.empty(len(shards), dtype=np.int64)
        for epoch in np.unique(epochs):
            shuffled, starts = self._line(int(epoch))
            here = epochs == epoch
            lines[here] = starts[np.argsort(shuffled)[shards[here]]] + samples[here]
        shortest, longer = divmod(self.num_samples, self.num_streams)
        border = longer * (shortest + 1)  # the first streams have one sample more
        in_longer = lines < border
        streams = np.where(in_longer, lines // (shortest + 1), longer + (lines - border) // shortest)
        numbers = lines - self._starts(streams)
        first, sizes, keys = self._windows(epochs, streams, numbers)
        numbers = first + unpermute(numbers - first, sizes, keys)
        return epochs * self.num_samples + numbers * self.num_streams + self._turns(epochs, numbers, streams)

    def _streams(self, epochs: np.ndarray, numbers: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """Whose turn it is in each round.

        With streams in their own order, small batches would draw from one end of the line and the other in turn.
        """
        streams = (turns + self._begins(epochs, numbers)) % self.num_streams
        for epoch in np.unique(epochs):
            here = epochs == epoch
            streams[here] = self._ring(int(epoch))[streams[here]]
        return np.where(numbers < self.num_samples // self.num_streams, streams, turns)  # the last round is a short one

    def _turns(self, epochs: np.ndarray, numbers: np.ndarray, streams: np.ndarray) -> np.ndarray:
        """The inverse of `_streams`."""
        turns = np.empty_like(streams)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            turns[here] = np.argsort(self._ring(int(epoch)))[streams[here]]
        turns = (turns - self._begins(epochs, numbers)) % self.num_streams
        return np.where(numbers < self.num_samples // self.num_streams, turns, streams)

    def _begins(self, epochs: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Where on the ring of streams each round begins: int64 [n]."""
        drawn = child_keys(self._round_keys[None], epochs, numbers)[:, 0]
        return (drawn % np.uint64(self.num_streams)).astype(np.int64)

    def _starts(self, streams: np.ndarray) -> np.ndarray:
        """The first sample of each stream on the line."""
        shortest, longer = divmod(self.num_samples, self.num_streams)
        return streams * shortest + np.minimum(streams, longer)

    def _windows(
        self, epochs: np.ndarray, streams: np.ndarray, numbers: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the window that each sample of a stream is in: its first sample in the stream, its size and its keys.

        Windows of a stream differ by one sample at most: the w-th of k begins at w × length // k.
        """
        shortest, longer = divmod(self.num_samples, self.num_streams)
        lengths = shortest + (streams < longer)
        num_windows = np.maximum(1, (lengths + self.window // 2) // self.window)
        windows = ((numbers + 1) * num_windows - 1) // lengths
        first = windows * lengths // num_windows
        sizes = (windows + 1) * lengths // num_windows - first
        return first, sizes, child_keys(self._keys[None], epochs, streams, windows)

    def _line_of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the epoch's order, and the first sample of each on its line."""
        shuffled = permutation(len(self.samples_of_shards), root_keys(f"{self._identity} shards of epoch {epoch}"))
        counts = self.samples_of_shards[shuffled]
        return shuffled, np.cumsum(counts) - counts

    def _ring_of_epoch(self, epoch: int) -> np.ndarray:
        """The order in which streams take turns: int64 [num_streams]."""
        return permutation(self.num_streams, root_keys(f"{self._identity} streams of epoch {epoch}"))
