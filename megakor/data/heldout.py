"""Validation: a set of shards walked once, in order, so that every token is predicted exactly once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megakor.data.prefetch import Prefetcher
from megakor.data.source import Source
from megakor.data.stream import Batch, documents_of


class HeldoutSet:
    """A named validation set: windows that predict every token exactly once.

    The windows do not overlap and are laid over an end-of-document token followed by the set's tokens, so that the
    first token is predicted too; labels past the end are masked.
    """

    def __init__(
        self,
        name: str,
        folder: str | Path,
        sequence_length: int,
        files: Prefetcher | None = None,
        separate_documents: bool = False,
    ) -> None:
        if sequence_length < 1:
            raise ValueError(f"train.sequence_length={sequence_length} must be at least 1")
        self.name = name
        self.tokens = Source(folder, files)
        if self.tokens.foreign:
            raise ValueError(
                f"{name}={folder} must be shards that megakor made: others do not tell the bytes of their text"
            )
        self.sequence_length, self.separate_documents = sequence_length, separate_documents
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
        documents = documents_of(inputs, eod) if self.separate_documents else None
        return Batch(inputs, labels, mask, self.num_tokens, documents)
