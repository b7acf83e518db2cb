"""Shards become training batches: what a step sees is a pure function of its number.

    step ─► samples of the run ─► positions of the stream ─► sources ─► shards and samples ─► tokens
          (plan)                (plan: skipped ones)       (mixture)  (order)              (source)

Nothing here keeps a position. `PretrainStream` deals each global batch to data ranks, whatever their number.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megakor.config.schema import DataConfig, TrainConfig
from megakor.data.cache import ShardCache
from megakor.data.changes import fingerprints
from megakor.data.maps import Maps
from megakor.data.mixture import Mixture, Share
from megakor.data.order import ORDER_VERSION, SourceOrder
from megakor.data.plan import Plan
from megakor.data.prefetch import Prefetcher
from megakor.data.skips import merged, read_skips
from megakor.data.source import Source

STEPS_AHEAD = 8  # for which shards are fetched


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Its arrays may share memory, and are not to be written to. `num_loss_tokens` belongs to the whole it is part of:
    divide the summed loss by it. With `documents`, positions
    begin anew at each document of a row, and tokens attend within theirs; without, a row is one stretch.
    """

    input_ids: np.ndarray  # [micro_batch, sequence_length] int64
    labels: np.ndarray  # [micro_batch, sequence_length] int64
    loss_mask: np.ndarray  # [micro_batch, sequence_length] float32: 1 where the label counts
    num_loss_tokens: int  # unmasked labels of the global batch (training) or of the whole set (validation)
    documents: np.ndarray | None = None  # [micro_batch, sequence_length] int32: the input token's, rising within a row


class TokenizerSizes(Protocol):
    """What the stream must know of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod_id(self) -> int: ...


@dataclass(frozen=True)
class Rows:
    """The samples of a global batch, in the order in which they are dealt; all int64 [n].

    Attributes:
        positions: in the stream.
        sources: number of the source.
        epochs: how often the source had been read through before.
        shards: number of the shard in the source's manifest.
        samples: number of the sample in its shard.
    """

    positions: np.ndarray
    sources: np.ndarray
    epochs: np.ndarray
    shards: np.ndarray
    samples: np.ndarray


def share(size: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """First row, and the one after the last, of a rank's run of `size` rows; runs differ by one row at most."""
    return size * rank // num_ranks, size * (rank + 1) // num_ranks


def documents_of(inputs: np.ndarray, eod_id: int) -> np.ndarray:
    """The number of each token's document in its row: int32 [rows, seq]. The token that ends one belongs to it."""
    ends = inputs == eod_id
    return (np.cumsum(ends, axis=1) - ends).astype(np.int32)


def digest_of(batches: Sequence[Batch]) -> int:
    """The sum of the CRC-32 of each row's inputs; rows that are masked whole do not count.

    Sums of the data ranks add up to that of the global batch, however it is dealt. Exact in a float64 for 2^21 rows.
    """
    return sum(
        zlib.crc32(row.tobytes())
        for batch in batches
        for row, mask in zip(batch.input_ids, batch.loss_mask, strict=True)
        if mask.any()
    )


class PretrainStream:
    """The endless shuffled stream of global batches; every data-parallel size sees the same ones.

    Args:
        sources: by name.
        mixture: of the same sources, in their order.
        plan: of the run's steps.
        seed: of the run.
        num_streams: canonical streams; numbers of nodes that divide it share the reading evenly.
        shuffle_window: samples of a stream that are shuffled among each other.
        fingerprints: of the sources' shards, as the run began with them.
        eod_id: of the token that ends a document, and fills rows up.
        vocab_size: tokens that the tokenizer has.
        num_steps: of the run: nothing is fetched ahead for those after them.
        separate_documents: whether positions begin anew, and attention ends, where a document does.
        files: fetches what is elsewhere; told what the next steps need.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        mixture: Mixture,
        plan: Plan,
        *,
        seed: int,
        num_streams: int,
        shuffle_window: int,
        fingerprints: Mapping[str, str],
        eod_id: int,
        vocab_size: int,
        num_steps: int,
        separate_documents: bool = False,
        files: Prefetcher | None = None,
    ) -> None:
        self.sources, self.mixture, self.plan, self.seed = dict(sources), mixture, plan, seed
        self.num_streams, self.shuffle_window = num_streams, shuffle_window
        self.eod_id, self.vocab_size, self.separate_documents = eod_id, vocab_size, separate_documents
        self.files, self.num_steps = files, num_steps
        self.orders = [
            SourceOrder(
                source.samples_of_shards(plan.sequence_length),
                seed=seed,
                name=name,
                num_streams=num_streams,
                window=shuffle_window,
            )
            for name, source in sources.items()
        ]
        self._list = list(sources.values())
        self._fingerprints = dict(fingerprints)
        self._ones = lru_cache(lambda num_rows: np.ones((num_rows, plan.sequence_length), dtype=np.float32))
        self._rows_of = lru_cache(maxsize=STEPS_AHEAD + 1)(self.rows)

    def skipping(self, more: Sequence[Sequence[int]]) -> PretrainStream:
        """The same stream with more stretches left out."""
        other, plan = copy.copy(self), self.plan
        skip = merged(plan.skip, more)
        other.plan = Plan(plan.global_batch_size, plan.sequence_length, plan.batch_sizes, plan.sequence_lengths, skip)
        other._rows_of = lru_cache(maxsize=STEPS_AHEAD + 1)(other.rows)
        return other

    def close(self) -> None:
        """Fetch no more."""
        if self.files is not None:
            self.files.close()

    def rows(self, step: int) -> Rows:
        """The samples of global batch `step` (from 0), in the order of their canonical streams."""
        taken = self.plan.step(step)
        positions = self.plan.positions(np.arange(taken.start, taken.start + taken.size))
        sources, numbers = self.mixture.at(positions)
        epochs, shards, samples, streams = (np.empty_like(positions) for _ in range(4))
        for source in np.unique(sources):
            here = sources == source
            places = self.orders[source].at(numbers[here])
            epochs[here], shards[here], samples[here] = places.epochs, places.shards, places.samples
            # A small source has fewer streams: each stands where that part of the whole does.
            streams[here] = places.streams * self.num_streams // self.orders[source].num_streams
        dealt = np.lexsort((positions, streams))
        return Rows(*(values[dealt] for values in (positions, sources, epochs, shards, samples)))

    def micro_batches(self, step: int, dp_rank: int, dp_size: int, micro_batch_size: int) -> list[Batch]:
        """Data rank `dp_rank`'s part of global batch `step` (from 0), in order, in micro-batches.

        A rank takes a run of the batch's rows, so that the ranks of a node read neighbouring streams. All ranks have as
        many micro-batches of as many rows: what is missing is filled up with rows that are masked whole. Ranks that
        share a data rank (tensor, pipeline, context) get the same.
        """
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank={dp_rank} must be in 0 … dp_size - 1 = {dp_size - 1}")
        if micro_batch_size < 1:
            raise ValueError(f"train.micro_batch_size={micro_batch_size} must be at least 1")
        self._want(step, dp_rank, dp_size)
        taken, rows, length = self.plan.step(step), self._rows_of(step), self.plan.sequence_length
        num_labels = np.empty_like(rows.positions)
        for number, source in enumerate(self._list):
            here = rows.sources == number
            num_labels[here] = source.num_labels(rows.shards[here], rows.samples[here], length)
        first, last = share(taken.size, dp_rank, dp_size)
        own = [values[first:last].tolist() for values in (rows.sources, rows.shards, rows.samples, num_labels)]
        places = list(zip(*own, strict=True))
        num_micro_batches, num_loss_tokens = -(-taken.size // (dp_size * micro_batch_size)), int(num_labels.sum())
        return [
            self._batch(
                places[start : start + micro_batch_size], micro_batch_size, taken.sequence_length, num_loss_tokens
            )
            for start in range(0, num_micro_batches * micro_batch_size, micro_batch_size)
        ]

    def _batch(
        self, places: Sequence[tuple[int, int, int, int]], num_rows: int, sequence_length: int, num_loss_tokens: int
    ) -> Batch:
        """Samples, by (source, shard, sample, labels), as a micro-batch; what is missing is filled up and masked."""
        length = self.plan.sequence_length
        tokens = np.empty((num_rows, length + 1), dtype=np.int64)
        mask = self._ones(num_rows)
        if len(places) < num_rows or any(place[3] < length for place in places):
            mask = np.zeros_like(mask)
            tokens.fill(self.eod_id)
            for row, place in enumerate(places):
                mask[row, : place[3]] = 1.0
        for row, (source, shard, sample, num_labels) in enumerate(places):
            held = self._list[source]
            tokens[row, : num_labels + 1] = held.sample(shard, sample, length)
            if held.foreign and (largest := tokens[row].max()) >= self.vocab_size:
                raise ValueError(
                    f"{held.folder}: token {largest} must be below the tokenizer's vocabulary, {self.vocab_size}"
                )
        cut = (num_rows * length // sequence_length, sequence_length)  # no copy where rows stay whole
        inputs, labels, masks = (values.reshape(cut) for values in (tokens[:, :-1], tokens[:, 1:], mask))
        documents = documents_of(inputs, self.eod_id) if self.separate_documents else None
        return Batch(inputs, labels, masks, num_loss_tokens, documents)

    def _want(self, step: int, dp_rank: int, dp_size: int) -> None:
        """Have the shards fetched that a data rank needs for this step and those after it."""
        if self.files is None:
            return
        wanted: dict[tuple[int, int], None] = {}  # an ordered set
        for ahead in range(step, min(step + STEPS_AHEAD, self.num_steps)):
            rows = self._rows_of(ahead)
            first, last = share(len(rows.positions), dp_rank, dp_size)
            pairs = zip(rows.sources[first:last].tolist(), rows.shards[first:last].tolist(), strict=True)
            wanted |= dict.fromkeys(pairs)
        files = (self._list[source].wanted(shard) for source, shard in wanted)
        self.files.want(file for file in files if file is not None)

    def state(self, step: int) -> dict[str, Any]:
        """What the batches before a step depend on, by configuration key; a run that goes on there must have the same.

        What is to come may change: sizes, weights and skipped stretches from there on are not in it.
        """
        plan = self.plan
        return {
            "order_version": ORDER_VERSION,
            "train.seed": self.seed,
            "train.sequence_length": plan.sequence_length,
            **plan.state(step),
            "data.separate_documents": self.separate_documents,
            "data.num_streams": self.num_streams,
            "data.shuffle_window": self.shuffle_window,
            "data.weights": self.mixture.state(plan.end_of(step)),
            **{f"data.sources.{name}" if name else "data.train": value for name, value in self._fingerprints.items()},
        }


def pretrain_stream(
    data: DataConfig, train: TrainConfig, tokenizer: TokenizerSizes, run: Path, num_processes: int = 1
) -> PretrainStream:
    """The stream of a run.

    Args:
        tokenizer: that the shards were made with.
        run: its folder, which has what it began with and what it has left out since, or nothing yet.
        num_processes: of this machine that share the cache.

    Raises:
        FileNotFoundError: a source is not there.
        ValueError: a source is damaged, too short, or has changed since the run began; or the run needs more than its
            sources may be read.
    """
    files = prefetcher(data, num_processes)
    maps = Maps(files.max_open_bytes if files else 0)
    sources = {name: Source(folder, files, maps) for name, folder in data.named_sources.items()}
    skip = merged(data.skip, *(skipped.stretches for skipped in read_skips(run)))
    plan = Plan(train.global_batch_size, train.sequence_length, train.batch_sizes, train.sequence_lengths, skip)
    shares = [
        Share(name, int(source.samples_of_shards(train.sequence_length).sum()), data.max_epochs.get(name))
        for name, source in sources.items()
    ]
    first: dict[str, Any] = dict(data.weights) or {
        name: natural_weight(source, data.temperature) for name, source in sources.items()
    }
    changes = {-(-tokens // train.sequence_length): weights for tokens, weights in data.curriculum.items()}
    curriculum = {at: [weights[name] for name in sources] for at, weights in {0: first, **changes}.items()}
    mixture = Mixture(shares, curriculum, train.seed)
    for number, used in enumerate(shares):
        last = mixture.phases[-1]
        if used.max_epochs and curriculum[0][number] and not last.drawn[number] and not last.weights[number]:
            raise ValueError(
                f"data.max_epochs.{used.name}={used.max_epochs} must leave more than {used.limit} samples: that is "
                f"less than the source's part of a block of {mixture.block}"
            )
    end = plan.end_of(train.num_steps)
    if mixture.end is not None and end > mixture.end:
        raise ValueError(
            f"train.num_steps={train.num_steps} takes {end} samples, and must take at most the {mixture.end} that "
            f"data.max_epochs={data.max_epochs} leaves"
        )
    return PretrainStream(
        sources,
        mixture,
        plan,
        seed=train.seed,
        num_streams=data.num_streams,
        shuffle_window=data.shuffle_window,
        fingerprints=fingerprints(run, sources, data.accept_changed),
        eod_id=tokenizer.eod_id,
        vocab_size=tokenizer.vocab_size,
        num_steps=train.num_steps,
        separate_documents=data.separate_documents,
        files=files,
    )


def prefetcher(data: DataConfig, num_processes: int) -> Prefetcher | None:
    """What fetches the shards that are elsewhere; None without a folder to fetch them to."""
    if data.cache is None:
        return None
    return Prefetcher(ShardCache(data.cache, data.cache_size), num_processes=num_processes)


def natural_weight(source: Source, temperature: float) -> Fraction:
    """A source's weight by its size: tokens ** (1 / temperature), to twelve digits, which all machines agree on."""
    if temperature == 1:
        return Fraction(source.num_tokens)
    return Fraction(f"{source.num_tokens ** (1 / temperature):.12g}")
