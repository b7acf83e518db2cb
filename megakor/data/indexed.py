"""One shard: a pair of files in Megatron's indexed format, version 1.

`PREFIX.bin` is the tokens of all documents laid end to end. `PREFIX.idx` is, little-endian and unpadded: the magic
`MMIDIDX\\0\\0`, the version (u64), a code for the token type (u8), the number of sequences n (u64), the number of
document indices d (u64, one more than there are documents), n lengths in tokens (i32), n offsets into the .bin in
bytes (i64), and d indices of the sequences at which documents begin, the last being n (i64). GPT-NeoX and
Megatron-LM read what `IndexedWriter` writes, where one document is one sequence; `IndexedReader` reads theirs.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megakor.files import sync

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, sequences, document indices
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
MAX_SEQUENCE_LENGTH = 2**31 - 1


def dtype_for(vocab_size: int) -> np.dtype:
    """The smallest token type that Megatron uses and that holds every id of the vocabulary."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<i4")


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hexadecimal) of a file as it was written."""

    size: int
    sha256: str


class IndexedWriter:
    """Writes one shard beside its final place; `close` moves it there whole, `abort` removes what is unfinished."""

    def __init__(self, prefix: str | Path, dtype: np.dtype | type | str) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in DTYPES.items() if known == self.dtype]
        if not codes:
            raise ValueError(f"dtype={self.dtype} must be one of {', '.join(str(known) for known in DTYPES.values())}")
        self._code = codes[0]
        self._lengths = array("i")
        self._sha256 = hashlib.sha256()
        self.num_tokens = 0
        self._temporary_bin = Path(f"{self.prefix}.bin.tmp")
        self._temporary_idx = Path(f"{self.prefix}.idx.tmp")
        self._bin = self._temporary_bin.open("wb", buffering=1 << 20)

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document's tokens, as one sequence. ValueError when an id does not fit the shard's type."""
        wide = np.asarray(ids)
        tokens = wide.astype(self.dtype, copy=False)
        if wide.ndim != 1 or (wide.size and wide.dtype != self.dtype and not np.array_equal(wide, tokens)):
            raise ValueError(f"{self.prefix}: a document must be a list of ids that fit dtype={self.dtype}")
        if len(tokens) > MAX_SEQUENCE_LENGTH:
            raise ValueError(
                f"{self.prefix}: a document of {len(tokens)} tokens is longer than the format's {MAX_SEQUENCE_LENGTH}"
            )
        buffer = np.ascontiguousarray(tokens).data.cast("B") if len(tokens) else b""
        self._bin.write(buffer)
        self._sha256.update(buffer)
        self._lengths.append(len(tokens))
        self.num_tokens += len(tokens)

    def close(self) -> dict[str, FileRecord]:
        """Write the index, sync both files and move them to their names; what was written, by file name."""
        lengths = np.asarray(self._lengths, dtype="<i4")
        offsets = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
        index = b"".join(
            (
                HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(lengths) + 1),
                lengths.tobytes(),
                (offsets * self.dtype.itemsize).tobytes(),
                np.arange(len(lengths) + 1, dtype="<i8").tobytes(),
            )
        )
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        with self._temporary_idx.open("wb") as stream:
            stream.write(index)
            stream.flush()
            os.fsync(stream.fileno())
        self._temporary_bin.replace(bin_path(self.prefix))
        self._temporary_idx.replace(idx_path(self.prefix))
        sync(bin_path(self.prefix).parent)
        return {
            bin_path(self.prefix).name: FileRecord(self.num_tokens * self.dtype.itemsize, self._sha256.hexdigest()),
            idx_path(self.prefix).name: FileRecord(len(index), hashlib.sha256(index).hexdigest()),
        }

    def abort(self) -> None:
        """Remove the unfinished files."""
        self._bin.close()
        self._temporary_bin.unlink(missing_ok=True)
        self._temporary_idx.unlink(missing_ok=True)


class Index:
    """What an index file says, memory-mapped. Opening it costs the header alone, whatever its size.

    `sequence_lengths` [n] in tokens, `sequence_offsets` [n] in bytes and `document_indices` [d] are read-only views.
    Raises ValueError naming the file when it is no such index, or when its size contradicts it.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as stream:
            header = stream.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise ValueError(f"{path}: must begin with the header of a Megatron index (MMIDIDX)")
        _, version, code, num_sequences, num_indices = HEADER.unpack(header)
        if version != VERSION or code not in DTYPES:
            raise ValueError(f"{path}: version={version} must be {VERSION} and type code={code} one of {list(DTYPES)}")
        self.dtype = DTYPES[code]
        needed = HEADER.size + num_sequences * (4 + 8) + num_indices * 8
        actual = path.stat().st_size
        if actual < needed:
            raise ValueError(
                f"{path}: size={actual} must be at least {needed} for {num_sequences} sequences: truncated"
            )
        raw = np.asarray(np.memmap(path, mode="r"))
        lengths_end = HEADER.size + num_sequences * 4
        offsets_end = lengths_end + num_sequences * 8
        self.sequence_lengths = raw[HEADER.size : lengths_end].view("<i4")
        self.sequence_offsets = raw[lengths_end:offsets_end].view("<i8")
        self.document_indices = raw[offsets_end:needed].view("<i8")
        size = 0
        if num_sequences:
            size = int(self.sequence_offsets[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        self.num_tokens = size // self.dtype.itemsize

    def document_starts(self) -> np.ndarray:
        """Where each document begins, in tokens, and where the last ends: int64 [num_documents + 1]."""
        starts = np.append(self.sequence_offsets // self.dtype.itemsize, self.num_tokens)
        return starts[self.document_indices]


class IndexedReader:
    """One shard, memory-mapped: `tokens` [num_tokens] besides its index."""

    def __init__(self, prefix: str | Path) -> None:
        self.index = Index(idx_path(prefix))
        self.dtype, self.num_tokens = self.index.dtype, self.index.num_tokens
        self.sequence_lengths, self.sequence_offsets = self.index.sequence_lengths, self.index.sequence_offsets
        self.document_indices = self.index.document_indices
        self.tokens = map_tokens(bin_path(prefix), self.dtype, self.num_tokens)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """The tokens of one sequence."""
        start = int(self.sequence_offsets[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sequence_lengths[index])]


def map_tokens(path: Path, dtype: np.dtype, num_tokens: int, in_use: bool = False) -> np.ndarray:
    """Memory-map a .bin that must hold exactly `num_tokens`: a read-only array [num_tokens].

    `in_use` keeps a shared lock on the file as long as the map lives. FileNotFoundError when it is gone before that.
    """
    if not num_tokens:
        return np.empty(0, dtype)
    with path.open("rb") as file:
        if in_use:
            fcntl.flock(file, fcntl.LOCK_SH)  # of the open file, which the map's own descriptor shares
        state = os.fstat(file.fileno())
        if in_use and not state.st_nlink:
            raise FileNotFoundError(errno.ENOENT, "removed while it was opened", str(path))
        expected = num_tokens * dtype.itemsize
        if state.st_size != expected:
            raise ValueError(
                f"{path}: size={state.st_size} must be {expected} ({num_tokens} tokens of {dtype}): "
                "truncated or changed"
            )
        # A plain array over the map: slicing a np.memmap itself costs several times more.
        return np.asarray(np.memmap(file, dtype=dtype, mode="r"))
