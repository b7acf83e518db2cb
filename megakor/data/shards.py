"""The entries of a folder's shards, as rows of a table: a hundred thousand of them are read in a blink.

`shards.parquet` holds one row for each shard: counts, and size and SHA-256 of its files. A shard's files are

    PREFIX.bin  PREFIX.idx        its tokens, in Megatron's format (`megakor.data.indexed`)
    PREFIX.documents.parquet      id and source of each document, in order; not there in shards of other makers
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megakor.data.indexed import FileRecord

SUFFIXES = {"bin": ".bin", "idx": ".idx", "documents": ".documents.parquet"}
"""Of a shard's files, by the name of their columns."""

COUNTS = ("num_tokens", "num_documents", "num_bytes", "num_replaced")

PLAIN = re.compile(r"[\w-]+(/[\w-]+)*")
"""Prefixes that are certain to stay in their folder; the others are looked at one by one."""

SCHEMA = pa.schema(
    [
        pa.field("prefix", pa.string(), nullable=False),
        *(pa.field(name, pa.int64(), nullable=False) for name in COUNTS),
        pa.field("text_sha256", pa.binary(32)),
        *(
            pa.field(f"{name}_{what}", kind)
            for name in SUFFIXES
            for what, kind in (("size", pa.int64()), ("sha256", pa.binary(32)))
        ),
        pa.field("sources", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class ShardEntry:
    """One shard. Counts of text are of its normal form, which the tokenizer sees."""

    prefix: str  # of its files, relative to the manifest's folder
    num_tokens: int  # end-of-document tokens included
    num_documents: int
    num_bytes: int  # UTF-8 bytes of the text
    num_replaced: int  # characters U+2581 that the normal form replaced
    text_sha256: str  # of the SHA-256 of each document's text as it was read, in order
    files: dict[str, FileRecord]
    sources: list[str]  # of its documents; the first hundred

    def file(self, kind: str) -> tuple[str, FileRecord]:
        """Name and record of one of its files: `bin`, `idx` or `documents`. KeyError where it has none."""
        name = self.prefix + SUFFIXES[kind]
        return name, self.files[name]


class Shards(Sequence[ShardEntry]):
    """Entries as columns; each is made when it is asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()

    @classmethod
    def of(cls, entries: Iterable[ShardEntry]) -> Shards:
        return cls(pa.Table.from_pylist([_row(entry) for entry in entries], SCHEMA))

    @classmethod
    def from_bytes(cls, content: bytes) -> Shards:
        """From a Parquet file's content. ValueError where it is none of shards, or names a file outside its folder."""
        table = pq.ParquetFile(io.BytesIO(content)).read(use_threads=False)  # read_table would import pandas
        if table.schema.names != SCHEMA.names:
            raise ValueError(f"columns={table.schema.names} must be {SCHEMA.names}")
        # A cast imports Arrow's functions, a tenth of a second; it is for tables that others have written.
        shards = cls(table if table.schema.equals(SCHEMA) else table.cast(SCHEMA))
        for prefix in shards.prefixes:
            if not PLAIN.fullmatch(prefix):
                check_name(prefix)
        return shards

    def to_bytes(self) -> bytes:
        stream = io.BytesIO()
        pq.write_table(self._table, stream, compression="zstd")
        return stream.getvalue()

    @property
    def prefixes(self) -> list[str]:
        return self._table["prefix"].to_pylist()

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """Of each shard: int64 [num_shards]."""
        return self._column("num_tokens")

    @property
    def bin_sizes(self) -> np.ndarray:
        """Bytes of each shard's tokens: int64 [num_shards]."""
        return self._column("bin_size")

    def total(self, count: str) -> int:
        """Of one of `COUNTS` over all shards."""
        return int(self._column(count).sum())

    @property
    def sources(self) -> list[str]:
        flat = self._table["sources"].combine_chunks().flatten()
        return sorted(flat.unique().to_pylist())

    def file_sizes(self) -> Iterator[tuple[str, int]]:
        """Name and bytes of every file of every shard."""
        for column, suffix in SUFFIXES.items():
            for prefix, size in zip(self.prefixes, self._table[f"{column}_size"].to_pylist(), strict=True):
                if size is not None:
                    yield prefix + suffix, size

    def _column(self, name: str) -> np.ndarray:
        """A column of numbers: int64 [num_shards]. Arrow's own way to NumPy would import pandas."""
        column = self._table[name]
        return np.from_dlpack(column.chunk(0)) if len(column) else np.empty(0, np.int64)

    @property
    def digests(self) -> np.ndarray:
        """The SHA-256 of each shard's tokens: uint8 [num_shards, 32]."""
        column = self._table["bin_sha256"]
        if not len(column):
            return np.empty((0, 32), np.uint8)
        _, values = column.chunk(0).buffers()
        return np.frombuffer(values, np.uint8).reshape(-1, 32)[column.chunk(0).offset :][: len(column)]

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> ShardEntry: ...
    @overload
    def __getitem__(self, index: slice) -> list[ShardEntry]: ...
    def __getitem__(self, index: int | slice) -> ShardEntry | list[ShardEntry]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"shard {index} of {len(self)}")
        start = index % len(self)
        return _entry(self._table.slice(start, 1).to_pylist()[0])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shards) and self._table.equals(other._table)


def check_name(name: str) -> None:
    """ValueError when a file's name leads out of its folder."""
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts or not inside.name:
        raise ValueError(f"name={name!r} must stay inside the manifest's folder")


def shard_entry(raw: Mapping[str, Any]) -> ShardEntry:
    """A shard's entry from its JSON; ValueError when it names a file outside its folder."""
    files = {str(name): FileRecord(int(file["size"]), str(file["sha256"])) for name, file in raw["files"].items()}
    prefix = str(raw["prefix"])
    for name in (prefix, *files):
        check_name(name)
    if not {f"{prefix}.bin", f"{prefix}.idx"} <= files.keys():
        raise ValueError(f"shard {prefix!r} must list its .bin and .idx")
    counts = {name: int(raw[name]) for name in COUNTS}
    sources = [str(source) for source in raw["sources"]]
    return ShardEntry(prefix=prefix, text_sha256=str(raw["text_sha256"]), files=files, sources=sources, **counts)


def _row(entry: ShardEntry) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(entry, name) for name in ("prefix", *COUNTS, "sources")}
    row["text_sha256"] = bytes.fromhex(entry.text_sha256) or None
    for column, suffix in SUFFIXES.items():
        record = entry.files.get(entry.prefix + suffix)
        row[f"{column}_size"] = record and record.size
        row[f"{column}_sha256"] = record and bytes.fromhex(record.sha256)
    return row


def _entry(row: Mapping[str, Any]) -> ShardEntry:
    files = {
        row["prefix"] + suffix: FileRecord(row[f"{column}_size"], row[f"{column}_sha256"].hex())
        for column, suffix in SUFFIXES.items()
        if row[f"{column}_size"] is not None
    }
    counts = {name: row[name] for name in COUNTS}
    text = (row["text_sha256"] or b"").hex()
    return ShardEntry(prefix=row["prefix"], text_sha256=text, files=files, sources=row["sources"] or [], **counts)
