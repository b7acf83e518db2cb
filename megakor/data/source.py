"""One source of tokens: the shards of a folder, memory-mapped as they are needed."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megakor.data.indexed import Index, map_tokens
from megakor.data.manifest import LocalFolder, load_manifest
from megakor.data.shards import SUFFIXES

MAX_OPEN_SHARDS = 256  # each holds a file descriptor; processes are commonly allowed 1,024


class Source:
    """The shards of a folder.

    A sample is `sequence_length` inputs and as many labels, one token on; samples of a shard share one token with
    their neighbours. They stay within their shard, so that reading one takes one file: the last of a shard is short.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = LocalFolder(Path(folder))
        self.manifest = load_manifest(self.folder)
        self.num_tokens = self.manifest.num_tokens
        self._dtype = np.dtype(self.manifest.dtype)
        self._starts = np.concatenate([[0], np.cumsum(self.manifest.shards.num_tokens)])
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()

    def __reduce__(self) -> tuple[type[Source], tuple[Path]]:
        return Source, (self.folder.path,)  # pickling an open map would copy its tokens

    def samples_of_shards(self, sequence_length: int) -> np.ndarray:
        """Samples of each shard, the short last one included: int64 [num_shards].

        ValueError when no shard fills one.
        """
        labels = np.maximum(self.manifest.shards.num_tokens - 1, 0)
        if not len(labels) or labels.max() < sequence_length:
            longest = int(labels.max()) + 1 if len(labels) else 0
            raise ValueError(
                f"train.sequence_length={sequence_length} must be below the number of tokens in a shard of "
                f"{self.folder.url}: {longest}"
            )
        return -(-labels // sequence_length)

    def num_labels(self, shards: np.ndarray, samples: np.ndarray, sequence_length: int) -> np.ndarray:
        """Labels that samples have: int64 [n]."""
        left = self.manifest.shards.num_tokens[shards] - 1 - samples * sequence_length
        return np.minimum(left, sequence_length)

    def sample(self, shard: int, sample: int, sequence_length: int) -> np.ndarray:
        """A sample's tokens, with the one after its inputs: [at most sequence_length + 1] of the shards' type."""
        start = sample * sequence_length
        return self.tokens(shard)[start : start + sequence_length + 1]

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start … start + count - 1 of all shards laid end to end: int64 [count]. They must exist."""
        if not 0 <= start <= start + count <= self.num_tokens:
            raise ValueError(f"tokens {start} … {start + count} must lie within the source's {self.num_tokens}")
        tokens = np.empty(count, dtype=np.int64)
        done = 0
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while done < count:
            offset = start + done - int(self._starts[shard])
            piece = self.tokens(shard)[offset : offset + count - done]
            tokens[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1
        return tokens

    def tokens(self, shard: int) -> np.ndarray:
        """All tokens of a shard, a read-only map: [num_tokens of it] of the shards' type."""
        tokens = self._open.get(shard)
        if tokens is None:
            entry = self.manifest.shards[shard]
            name, _ = entry.file("bin")
            tokens = map_tokens(self.folder.path / name, self._dtype, entry.num_tokens)
            self._open[shard] = tokens
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(shard)
        return tokens

    def document_starts(self, shard: int) -> np.ndarray:
        """Where each document of a shard begins, in tokens, and where the last ends: int64 [num_documents + 1]."""
        name, _ = self.manifest.shards[shard].file("idx")
        return Index(self.folder.path / name).document_starts()

    def origins(self, shard: int) -> pa.Table | None:
        """`id` and `source` of each document of a shard, in order; None for a shard of another maker."""
        entry = self.manifest.shards[shard]
        if entry.prefix + SUFFIXES["documents"] not in entry.files:
            return None
        name, _ = entry.file("documents")
        return pq.ParquetFile(self.folder.path / name).read()
