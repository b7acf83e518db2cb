"""Shards become training batches: which samples a step sees is a pure function of its number.

The tokens of all shards, laid end to end, are cut into samples of sequence_length inputs and as many labels; neighbours
share one token, and samples cross documents and shards. `PretrainStream` deals the shuffled samples to data ranks;
`HeldoutSet` walks a set once, in order, for validation. Nothing here keeps a position.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megakor.data.indexed import map_tokens
from megakor.data.manifest import load_manifest
from megakor.data.order import ORDER_VERSION, sample_ids

MAX_OPEN_SHARDS = 256  # each holds a file descriptor; processes are commonly allowed 1,024


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    `num_loss_tokens` belongs to the whole it is part of: divide the summed loss by it. With `documents`, positions
    begin anew at each document of a row, and tokens attend within theirs; without, a row is one stretch.
    """

    input_ids: np.ndarray  # [micro_batch, sequence_length] int64
    labels: np.ndarray  # [micro_batch, sequence_length] int64
    loss_mask: np.ndarray  # [micro_batch, sequence_length] float32: 1 where the label counts
    num_loss_tokens: int  # unmasked labels of the global batch (training) or of the whole set (validation)
    documents: np.ndarray | None = None  # [micro_batch, sequence_length] int32: the input token's, rising within a row


class TokenStream:
    """The tokens of a folder's shards, laid end to end in the manifest's order."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = load_manifest(folder)
        self.num_tokens = self.manifest.num_tokens
        self._dtype = np.dtype(self.manifest.dtype)
        self._starts = np.cumsum([0] + [shard.num_tokens for shard in self.manifest.shards], dtype=np.int64)
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()

    def __reduce__(self) -> tuple[type[TokenStream], tuple[Path]]:
        return TokenStream, (self.folder,)  # pickling an open map would copy its tokens

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start … start + count - 1 of the stream: int64 [count]. They must exist."""
        if not 0 <= start <= start + count <= self.num_tokens:
            raise ValueError(f"tokens {start} … {start + count} must lie within the stream's {self.num_tokens}")
        tokens = np.empty(count, dtype=np.int64)
        done = 0
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while done < count:
            offset = start + done - int(self._starts[shard])
            piece = self._shard_tokens(shard)[offset : offset + count - done]
            tokens[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1
        return tokens

    def num_samples(self, sequence_length: int) -> int:
        """Whole samples in the stream. ValueError when there is none."""
        if sequence_length < 1:
            raise ValueError(f"train.sequence_length={sequence_length} must be at least 1")
        num_samples = (self.num_tokens - 1) // sequence_length
        if num_samples < 1:
            raise ValueError(
                f"train.sequence_length={sequence_length} must be below the number of tokens in {self.folder}: "
                f"{self.num_tokens}"
            )
        return num_samples

    def sample(self, index: int, sequence_length: int) -> np.ndarray:
        """Sample `index` with the token after it: int64 [sequence_length + 1]."""
        return self.read(index * sequence_length, sequence_length + 1)

    def _shard_tokens(self, shard: int) -> np.ndarray:
        tokens = self._open.get(shard)
        if tokens is None:
            entry = self.manifest.shards[shard]
            tokens = map_tokens(self.folder / f"{entry.prefix}.bin", self._dtype, entry.num_tokens)
            self._open[shard] = tokens
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(shard)
        return tokens


class PretrainStream:
    """The endless shuffled stream of global batches; every data-parallel size sees the same ones."""

    def __init__(self, folder: str | Path, *, seed: int, sequence_length: int, global_batch_size: int) -> None:
        if global_batch_size < 1:
            raise ValueError(f"train.global_batch_size={global_batch_size} must be at least 1")
        self.tokens = TokenStream(folder)
        self.seed = seed
        self.sequence_length = sequence_length
        self.global_batch_size = global_batch_size
        self.num_samples = self.tokens.num_samples(sequence_length)
        self._fingerprint = self.tokens.manifest.fingerprint()

    @property
    def num_tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    def micro_batches(self, step: int, dp_rank: int, dp_size: int, micro_batch_size: int) -> list[Batch]:
        """Data rank `dp_rank`'s part of global batch `step` (from 0), in order, in micro-batches.

        The global batch is positions step × global_batch_size and up of the order; rank r takes the r-th of dp_size
        equal runs. Ranks that share a data rank (tensor, pipeline, context) get the same.
        """
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank={dp_rank} must be in 0 … dp_size - 1 = {dp_size - 1}")
        if micro_batch_size < 1 or self.global_batch_size % (dp_size * micro_batch_size):
            raise ValueError(
                f"train.global_batch_size={self.global_batch_size} must be divisible by data_parallel_size={dp_size} "
                f"× train.micro_batch_size={micro_batch_size}"
            )
        part = self.global_batch_size // dp_size
        start = step * self.global_batch_size + dp_rank * part
        samples = sample_ids(self.seed, self.num_samples, start, part)
        return [self._batch(samples[first : first + micro_batch_size]) for first in range(0, part, micro_batch_size)]

    def _batch(self, samples: np.ndarray) -> Batch:
        tokens = np.stack([self.tokens.sample(int(index), self.sequence_length) for index in samples])
        mask = np.ones((len(samples), self.sequence_length), dtype=np.float32)
        inputs, labels = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
        return Batch(inputs, labels, mask, self.num_tokens_per_step)

    def state(self) -> dict[str, Any]:
        """What every batch depends on besides its step, by configuration key; a resumed run must have the same."""
        return {
            "order_version": ORDER_VERSION,
            "train.seed": self.seed,
            "train.sequence_length": self.sequence_length,
            "train.global_batch_size": self.global_batch_size,
            "data.train": self._fingerprint,
        }


class HeldoutSet:
    """A named validation set: windows that predict every token exactly once.

    The windows do not overlap and are laid over an end-of-document token followed by the set's tokens, so that the
    first token is predicted too; labels past the end are masked.
    """

    def __init__(self, name: str, folder: str | Path, sequence_length: int) -> None:
        if sequence_length < 1:
            raise ValueError(f"train.sequence_length={sequence_length} must be at least 1")
        self.name = name
        self.tokens = TokenStream(folder)
        self.sequence_length = sequence_length
        self.num_tokens = self.tokens.num_tokens
        self.num_text_bytes = self.tokens.manifest.num_text_bytes
        self.num_windows = -(-self.num_tokens // sequence_length)

    def windows(self, start: int, count: int) -> Batch:
        """Windows start … start + count - 1 as rows; rows past the last window are masked whole.

        `num_loss_tokens` is the set's number of tokens: the quotients of all its batches add up to the mean loss.
        """
        length, eod = self.sequence_length, self.tokens.manifest.eod_id
        inputs = np.full((count, length), eod, dtype=np.int64)
        labels = np.full((count, length), eod, dtype=np.int64)
        mask = np.zeros((count, length), dtype=np.float32)
        for row in range(count):
            first = (start + row) * length  # position of the row's first label in the set
            valid = min(length, self.num_tokens - first)
            if valid <= 0:
                break
            labels[row, :valid] = self.tokens.read(first, valid)
            inputs[row, 0] = self.tokens.read(first - 1, 1)[0] if first else eod
            inputs[row, 1:valid] = labels[row, : valid - 1]
            mask[row, :valid] = 1.0
        return Batch(inputs, labels, mask, self.num_tokens)
