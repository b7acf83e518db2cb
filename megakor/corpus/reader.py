"""Documents from files: .txt, .jsonl, .jsonl.gz, .jsonl.zst and .parquet, one stream of `Document`, one at a time.

Paths and globs go through fsspec, so a URL of a file system that it knows works like a path. A record that cannot be
read stops the stream with a `ValueError` that names file and line, or is skipped and counted.
"""

from __future__ import annotations

import gzip
import importlib.resources
import io
import json
import posixpath
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import fsspec
import pyarrow
import pyarrow.parquet
import zstandard

from megakor.config.schema import OnError
from megakor.logs import get_logger

ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
NUM_SKIPS_LOGGED = 10
PARQUET_BATCH = 256  # rows decoded at a time

log = get_logger(__name__)


@dataclass(frozen=True)
class Document:
    """One text. `source` is the record's own `source` field where it has one, else the file's name."""

    id: str
    text: str
    source: str


@dataclass
class ReadCounts:
    """What a reading found; `read_documents` fills all but `replaced_u2581`, which belongs to who normalises."""

    files: int = 0
    documents: int = 0  # yielded
    bytes: int = 0  # UTF-8 bytes of the yielded texts
    empty: int = 0  # texts without a visible character, left out
    skipped: int = 0  # records (or damaged rests of files) left out under on_error=skip
    replaced_u2581: int = 0


class _BadRecord(ValueError):
    """A record or the rest of a file that cannot be read; the message names file, line and rule."""


def expand(inputs: Sequence[str]) -> list[str]:
    """The files that paths, globs and folders name, sorted, each once. A folder stands for the files below it with a
    known ending. `ValueError` where one of `inputs` names nothing."""
    if isinstance(inputs, str) or not inputs:
        raise ValueError(f"inputs={inputs!r} must be a list of at least one file or glob")
    files: set[str] = set()
    for pattern in inputs:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        if filesystem.isdir(path):
            found = [name for name in filesystem.find(path) if name.endswith(ENDINGS)]
        elif filesystem.exists(path):
            found = [path]
        else:
            found = [name for name in filesystem.glob(path) if filesystem.isfile(name)]
        if not found:
            raise ValueError(f"inputs={pattern}: no such file, and no file matches it")
        local = isinstance(filesystem, fsspec.get_filesystem_class("file"))
        files.update(str(name) if local else filesystem.unstrip_protocol(name) for name in found)
    return sorted(files)


def read_documents(
    inputs: Sequence[str],
    *,
    text_key: str = "text",
    id_key: str = "id",
    on_error: OnError = OnError.stop,
    counts: ReadCounts,
) -> Iterator[Document]:
    """Every document of `inputs`, files in sorted order, texts as they are. A record without an id is named
    `<file name>:<line>` (row for .parquet).

    `ValueError`: nothing matches; an unknown ending; no text at all; and under `on_error=stop` a record that is not
    UTF-8, not JSON, or has no text. Under `skip` such a record is logged, counted in `counts.skipped` and left out; of
    a truncated or damaged file the records before the damage are kept.
    """
    files = expand(inputs)
    for file in files:
        if not file.endswith(ENDINGS):
            raise ValueError(f"inputs={file}: unknown ending, must be one of {', '.join(ENDINGS)}")
    for file in files:
        counts.files += 1
        name = posixpath.basename(file)
        for record in _read_file(file, text_key, id_key):
            if isinstance(record, _BadRecord):
                if on_error is OnError.stop:
                    raise ValueError(f"{record} (on_error=skip leaves such records out)")
                counts.skipped += 1
                if counts.skipped <= NUM_SKIPS_LOGGED:
                    more = "; further ones are only counted" if counts.skipped == NUM_SKIPS_LOGGED else ""
                    log.warning("skipped: %s%s", record, more)
                continue
            line, fields = record
            text = fields[text_key]
            if not text.strip():
                counts.empty += 1
                continue
            identity, source = fields.get(id_key), fields.get("source")
            counts.documents += 1
            counts.bytes += len(text.encode())
            yield Document(
                id=f"{name}:{line}" if identity is None else str(identity),
                text=text,
                source=source if isinstance(source, str) and source else name,
            )
    if counts.documents == 0:
        raise ValueError(
            f"inputs={', '.join(inputs)} hold no text: {counts.files} files, {counts.empty} empty documents, "
            f"{counts.skipped} skipped records"
        )


def sample_files() -> list[str]:
    """The packaged sample corpus: its document files."""
    folder = importlib.resources.files("megakor.corpus") / "sample"
    files = [str(file) for file in folder.iterdir() if file.name.endswith(".jsonl") and file.name != "pairs.jsonl"]
    return sorted(files)


def sample_pairs_file() -> str:
    """The packaged sample's instruction pairs."""
    return str(importlib.resources.files("megakor.corpus") / "sample" / "pairs.jsonl")


_Record = tuple[int, dict[str, Any]]  # line, fields; fields[text_key] is a valid str


def _read_file(file: str, text_key: str, id_key: str) -> Iterator[_Record | _BadRecord]:
    with fsspec.open(file, "rb") as raw:
        if file.endswith(".txt"):
            yield _read_txt(file, raw, text_key)
        elif file.endswith(".parquet"):
            yield from _read_parquet(file, raw, text_key, id_key)
        else:
            yield from _read_jsonl(file, raw, text_key)


def _read_txt(file: str, raw: IO[bytes], text_key: str) -> _Record | _BadRecord:
    data = raw.read()
    try:
        return 1, {text_key: data.decode("utf-8-sig").replace("\r\n", "\n")}
    except UnicodeDecodeError as error:
        return _not_utf8(file, data.count(b"\n", 0, error.start) + 1, data, error)


def _read_jsonl(file: str, raw: IO[bytes], text_key: str) -> Iterator[_Record | _BadRecord]:
    for line, data in _lines(file, raw):
        if isinstance(data, _BadRecord):
            yield data
        elif data.strip():
            yield _parse_json(file, line, data, text_key)


def _parse_json(file: str, line: int, data: bytes, text_key: str) -> _Record | _BadRecord:
    try:
        fields = json.loads(data.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return _not_utf8(file, line, data, error)
    except (json.JSONDecodeError, RecursionError) as error:
        return _BadRecord(f"{file}:{line}: broken JSON: {error}")
    if not isinstance(fields, dict):
        return _BadRecord(f"{file}:{line}: a line must hold one JSON object, not a {type(fields).__name__}")
    return _checked(file, line, fields, text_key)


def _read_parquet(file: str, raw: IO[bytes], text_key: str, id_key: str) -> Iterator[_Record | _BadRecord]:
    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(raw)
        names = table.schema_arrow.names
        if text_key not in names:
            yield _BadRecord(f"{file}: no column text_key={text_key} among {', '.join(names)}")
            return
        columns = [name for name in dict.fromkeys((text_key, id_key, "source")) if name in names]
        for batch in table.iter_batches(batch_size=PARQUET_BATCH, columns=columns):
            for index in range(batch.num_rows):
                row += 1
                yield _parse_row(file, row, batch, index, text_key)
    except (pyarrow.ArrowException, OSError) as error:
        message = str(error).splitlines()[0]
        yield _BadRecord(f"{file}:{row + 1}: truncated or damaged parquet, or not parquet at all: {message}")


def _parse_row(file: str, row: int, batch: pyarrow.RecordBatch, index: int, text_key: str) -> _Record | _BadRecord:
    try:
        fields = {name: batch.column(name)[index].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as error:
        return _not_utf8(file, row, error.object, error)
    return _checked(file, row, fields, text_key)


def _checked(file: str, line: int, fields: dict[str, Any], text_key: str) -> _Record | _BadRecord:
    """The record, or what is wrong with its text."""
    if text_key not in fields:
        return _BadRecord(f"{file}:{line}: no field text_key={text_key} among {', '.join(fields) or 'none'}")
    text = fields[text_key]
    if not isinstance(text, str):
        return _BadRecord(f"{file}:{line}: field {text_key} must be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return _BadRecord(
            f"{file}:{line}: field {text_key} holds a lone surrogate at character {error.start}, which is no text"
        )
    return line, fields


def _not_utf8(file: str, line: int, data: bytes, error: UnicodeDecodeError) -> _BadRecord:
    hint = ""
    try:
        data.decode("cp949")
        hint = "; it reads as CP949: convert it with `iconv -f CP949 -t UTF-8`"
    except UnicodeDecodeError:
        pass
    return _BadRecord(f"{file}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}: {error.reason}){hint}")


def _lines(file: str, raw: IO[bytes]) -> Iterator[tuple[int, bytes | _BadRecord]]:
    """(line, its bytes) of a plain or compressed file; a `_BadRecord` last where the compression breaks off."""
    stream: IO[bytes] = raw
    kind = ""
    if file.endswith(".gz"):
        stream, kind = gzip.GzipFile(fileobj=raw), "gzip"  # type: ignore[assignment]
    elif file.endswith(".zst"):
        stream, kind = io.BufferedReader(_ZstdStream(raw), 1 << 20), "zstd"
    line = 0
    try:
        for data in stream:
            line += 1
            yield line, data
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        yield line + 1, _BadRecord(f"{file}:{line + 1}: truncated or damaged {kind}: {error}")


class _ZstdStream(io.RawIOBase):
    """A zstd file of any number of frames. Unlike `ZstdDecompressor.stream_reader` it notices a missing end."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw = raw
        self.frame: Any = None
        self.pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.pending:
            data = self.raw.read(1 << 17)
            if not data:
                if self.frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self.pending = memoryview(self._decompress(data))
        count = min(len(buffer), len(self.pending))
        buffer[:count] = self.pending[:count]
        self.pending = self.pending[count:]
        return count

    def _decompress(self, data: bytes) -> bytes:
        parts = []
        while data:
            if self.frame is None:
                self.frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            parts.append(self.frame.decompress(data))
            data = b""
            if self.frame.eof:
                data, self.frame = self.frame.unused_data, None
        return b"".join(parts)
