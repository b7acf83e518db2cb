"""One shard being written: tokens, the documents that they are of, and last the record that says that it is whole."""

from __future__ import annotations

import hashlib
import io
import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megakor.data.indexed import FileRecord, IndexedWriter
from megakor.data.manifest import Manifest, write_json
from megakor.data.shards import SUFFIXES, ShardEntry
from megakor.files import atomic_write

MAX_SOURCES = 100  # names kept in a shard's entry; a source may be as fine as an address of each document


class Origin(NamedTuple):
    """Which document a text is."""

    id: str
    source: str


@dataclass(frozen=True)
class TokenisedChunk:
    """Several documents' tokens laid end to end, each closed by the end-of-document token."""

    tokens: np.ndarray  # [sum of lengths], of the shards' type
    lengths: list[int]  # tokens of each document
    num_bytes: list[int]  # UTF-8 bytes of each document's normal form
    num_replaced: list[int]  # characters U+2581 in each document
    digests: list[bytes]  # SHA-256 of each document's text as read


def record_path(out: Path, index: int) -> Path:
    return out / f"shard-{index:05d}.json"


class OpenShard:
    """The shard being written."""

    def __init__(self, out: Path, index: int, empty: Manifest) -> None:
        self.record = record_path(out, index)
        self.job = empty.job()
        self.writer = IndexedWriter(self.record.with_suffix(""), np.dtype(empty.dtype))
        self.num_bytes = 0
        self.num_replaced = 0
        self.digest = hashlib.sha256()
        self.origins: list[Origin] = []

    def add(self, chunk: TokenisedChunk, document: int, tokens: np.ndarray, origin: Origin) -> None:
        """Append the chunk's document with that index, whose tokens these are."""
        self.writer.add_document(tokens)
        self.num_bytes += chunk.num_bytes[document]
        self.num_replaced += chunk.num_replaced[document]
        self.digest.update(chunk.digests[document])
        self.origins.append(origin)

    def close(self) -> ShardEntry:
        """Files first, then the record: a shard with a record is whole."""
        self.record.unlink(missing_ok=True)
        sources = dict.fromkeys(origin.source for origin in self.origins)  # in the order of their first document
        entry = ShardEntry(
            prefix=self.record.stem,
            num_tokens=self.writer.num_tokens,
            num_documents=self.writer.num_documents,
            num_bytes=self.num_bytes,
            num_replaced=self.num_replaced,
            text_sha256=self.digest.hexdigest(),
            files={**self.writer.close(), **self._write_origins()},
            sources=sorted(itertools.islice(sources, MAX_SOURCES)),
        )
        write_json(self.record, {"job": self.job, "shard": asdict(entry)})
        return entry

    def _write_origins(self) -> dict[str, FileRecord]:
        """The table that says which document is which; `megakor trace` reads it."""
        table = pa.table(
            {
                "id": pa.array([origin.id for origin in self.origins], pa.string()),
                "source": pa.array([origin.source for origin in self.origins], pa.string()),
            }
        )
        stream = io.BytesIO()
        pq.write_table(table, stream, compression="zstd")
        path = self.record.with_name(self.record.stem + SUFFIXES["documents"])
        with atomic_write(path) as file:
            file.write(stream.getbuffer())
        return {path.name: FileRecord(stream.tell(), hashlib.sha256(stream.getbuffer()).hexdigest())}
