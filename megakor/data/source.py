"""One source of tokens: the shards of a folder, memory-mapped as they are needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megakor.data.foreign import foreign_manifest, is_foreign
from megakor.data.indexed import Index, map_tokens
from megakor.data.manifest import UNKNOWN, load_manifest
from megakor.data.maps import Maps
from megakor.data.prefetch import Prefetcher, Wanted
from megakor.data.remote import RemoteFolder
from megakor.data.shards import SUFFIXES

T = TypeVar("T")


class Source:
    """The shards of a folder.

    A sample is `sequence_length` inputs and as many labels, one token on; samples of a shard share one token with
    their neighbours. They stay within their shard, so that reading one takes one file: the last of a shard is short.

    Args:
        folder: path or URL of the folder; or a Megatron data set: the prefix of a .bin/.idx pair, or a folder of them.
        files: fetches the shards of a folder elsewhere.
        maps: that sources read together share; None: its own.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: the shards are damaged, or elsewhere and there is nothing to fetch them to.
    """

    def __init__(self, folder: str | Path, files: Prefetcher | None = None, maps: Maps | None = None) -> None:
        if is_foreign(str(folder)):
            self.folder, self.manifest = foreign_manifest(Path(folder))
        else:
            self.folder = RemoteFolder(str(folder))
            self.manifest = load_manifest(self.folder)
        if not self.folder.is_local and files is None:
            raise ValueError(
                f"data.cache (evaluate: cache) must name a folder of this machine for the shards of {self.folder}"
            )
        self.num_tokens = self.manifest.num_tokens
        self._files = None if self.folder.is_local else files
        self._maps = maps or Maps(files.max_open_bytes if files else 0)
        self._dtype = np.dtype(self.manifest.dtype)
        self._starts = np.concatenate([[0], np.cumsum(self.manifest.shards.num_tokens)])

    @property
    def foreign(self) -> bool:
        """Whether the shards are of another maker, who has not said what is in them."""
        return self.manifest.tokenizer_fingerprint == UNKNOWN

    def samples_of_shards(self, sequence_length: int) -> np.ndarray:
        """Samples of each shard, the short last one included: int64 [num_shards].

        ValueError when no shard fills one.
        """
        labels = np.maximum(self.manifest.shards.num_tokens - 1, 0)
        if not len(labels) or labels.max() < sequence_length:
            longest = int(labels.max()) + 1 if len(labels) else 0
            raise ValueError(
                f"train.sequence_length={sequence_length} must be below the number of tokens in a shard of "
                f"{self.folder}: {longest}"
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
        tokens = self._maps.get((self, shard))
        if tokens is None:
            num_bytes = self.manifest.shards[shard].file("bin")[1].size if self._files else 0
            tokens = self._maps.add((self, shard), num_bytes, lambda: self._map(shard))
        return tokens

    def document_starts(self, shard: int) -> np.ndarray:
        """Where each document of a shard begins, in tokens, and where the last ends: int64 [num_documents + 1]."""
        return self._use(shard, "idx", lambda path: Index(path).document_starts())

    def origins(self, shard: int) -> pa.Table | None:
        """`id` and `source` of each document of a shard, in order; None for a shard of another maker."""
        entry = self.manifest.shards[shard]
        if entry.prefix + SUFFIXES["documents"] not in entry.files:
            return None
        return self._use(shard, "documents", lambda path: pq.ParquetFile(path).read())

    def wanted(self, shard: int) -> Wanted | None:
        """A shard's tokens as the prefetcher takes them; None when they are open already."""
        return None if (self, shard) in self._maps else (self.folder, *self.manifest.shards[shard].file("bin"))

    def _map(self, shard: int) -> np.ndarray:
        entry, in_use = self.manifest.shards[shard], self._files is not None
        return self._use(shard, "bin", lambda path: map_tokens(path, self._dtype, entry.num_tokens, in_use=in_use))

    def _use(self, shard: int, kind: str, function: Callable[[Path], T]) -> T:
        """`function(path)` of one of a shard's files."""
        name, record = self.manifest.shards[shard].file(kind)
        if self._files is None:
            return function(self.folder.local_path(name))
        self._files.path(self.folder, name, record)  # waits, if it is on its way
        return self._files.cache.use(self.folder, name, record, function)
