"""Where every piece of a checkpoint is: a table of one row a piece, by which any range of any tensor is found.

    pieces.parquet: tensor, file, shard, offset, numel, begin ─► rows(tensor, shard) ─► bytes of a file

It is a table because ZeRO-3 on 512 ranks cuts a model into a million pieces, and every rank of a resume reads it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NAMES = ("tensor", "file")
NUMBERS = ("shard", "offset", "numel", "begin")
ORDER = ("tensor", "shard", "offset")
SCHEMA = pa.schema([(name, pa.dictionary(pa.int32(), pa.string())) for name in NAMES]
                   + [(name, pa.int64()) for name in NUMBERS])  # fmt: skip


class Held(NamedTuple):
    """A piece as the rank that wrote it tells: elements [offset, offset + numel) of a flattened shard of a tensor.

    A tuple, because rank 0 gathers those of all ranks.

    Attributes:
        tensor: `state/name`.
        shape: of the whole tensor.
        shard_dim: the dimension that it is cut along.
        num_shards: how many equal shards.
        shard: number of the shard.
        begin: first byte in the file.
    """

    tensor: str
    shape: tuple[int, ...]
    shard_dim: int
    num_shards: int
    shard: int
    offset: int
    numel: int
    begin: int


class PieceIndex:
    """The pieces, ordered by tensor, shard and offset; columns are arrays [num_pieces].

    Attributes:
        tensors: names, which `tensor` counts.
        files: names, which `file` counts.
    """

    def __init__(self, tensors: Sequence[str], files: Sequence[str], columns: Mapping[str, np.ndarray]) -> None:
        if not is_ordered([columns[name] for name in ORDER]):
            order = np.lexsort([columns[name] for name in reversed(ORDER)])
            columns = {name: column[order] for name, column in columns.items()}
        self.tensors, self.files = list(tensors), list(files)
        self.tensor, self.file = (columns[name] for name in NAMES)
        self.shard, self.offset, self.numel, self.begin = (columns[name] for name in NUMBERS)
        borders = np.searchsorted(self.tensor, np.arange(len(self.tensors) + 1))
        self._rows = {name: (int(borders[i]), int(borders[i + 1])) for i, name in enumerate(self.tensors)}

    def __len__(self) -> int:
        return len(self.tensor)

    @classmethod
    def of(cls, held: Mapping[str, Sequence[Held]]) -> PieceIndex:
        """From what each file holds."""
        files = sorted(held)
        counts = [len(held[name]) for name in files]

        def column(name: str) -> np.ndarray:
            """[num_pieces], file by file."""
            values = (getattr(piece, name) for piece in chain.from_iterable(held[file] for file in files))
            return np.fromiter(values, dtype=np.int64, count=sum(counts))

        tensors = sorted({piece.tensor for pieces in held.values() for piece in pieces})
        numbers = {name: number for number, name in enumerate(tensors)}
        codes = (numbers[piece.tensor] for piece in chain.from_iterable(held[file] for file in files))
        columns = {name: column(name) for name in NUMBERS}
        columns["tensor"] = np.fromiter(codes, dtype=np.int64, count=sum(counts))
        columns["file"] = np.repeat(np.arange(len(files), dtype=np.int64), counts)
        return cls(tensors, files, columns)

    @classmethod
    def from_bytes(cls, content: bytes) -> PieceIndex:
        """ValueError when it is no such table."""
        try:
            names: dict[str, list[str]] = {}
            columns: dict[str, np.ndarray] = {}
            for name in NAMES:  # column by column, for every rank of a resume reads the table
                codes = read_column(content, name).dictionary_encode()
                names[name] = codes.dictionary.to_pylist()
                columns[name] = np.from_dlpack(codes.indices).astype(np.int64)
            for name in NUMBERS:
                columns[name] = np.from_dlpack(read_column(content, name))
        except (pa.ArrowException, KeyError, TypeError) as error:
            raise ValueError(f"damaged ({error}); it must be a checkpoint's table of pieces") from None
        if any(column.dtype != np.int64 for column in columns.values()):
            raise ValueError("damaged; it must be a checkpoint's table of pieces, without empty fields")
        return cls(names["tensor"], names["file"], columns)

    def to_bytes(self) -> bytes:
        """The table as a Parquet file."""
        codes = {"tensor": (self.tensor, self.tensors), "file": (self.file, self.files)}
        arrays = [pa.DictionaryArray.from_arrays(numbers(c.astype(np.int32)), strings(n)) for c, n in codes.values()]
        arrays += [numbers(getattr(self, name)) for name in NUMBERS]
        out = io.BytesIO()
        pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), out, compression="zstd")
        return out.getvalue()

    def check(self, shapes: Mapping[str, tuple[Sequence[int], int]], sizes: Mapping[str, int]) -> None:
        """ValueError unless the pieces cover every tensor once, and lie within their files.

        Args:
            shapes: of each tensor, and into how many shards it is cut.
            sizes: of each file, in bytes.
        """
        if strangers := sorted(set(self.files) - sizes.keys()):
            raise ValueError(f"a piece lies in {strangers[0]!r}, which must be one of the listed files")
        if different := sorted(set(self.tensors) ^ shapes.keys()):
            raise ValueError(f"pieces of {different[0]} must cover its shape once: one or the other is missing")
        shard_sizes = np.array([math.prod(shape) // count for shape, count in (shapes[n] for n in self.tensors)])
        totals = np.array([math.prod(shapes[name][0]) for name in self.tensors])
        own = shard_sizes[self.tensor]
        starts = self.shard * own + self.offset
        before = np.concatenate([[0], (starts + self.numel)[:-1]])
        first = np.concatenate([[True], self.tensor[1:] != self.tensor[:-1]])
        last = np.concatenate([first[1:], [True]])
        right = (starts == np.where(first, 0, before)) & (self.offset + self.numel <= own) & (self.offset >= 0)
        right &= (self.numel > 0) & (self.shard >= 0) & (~last | (starts + self.numel == totals[self.tensor]))
        if not right.all():
            name = self.tensors[int(self.tensor[np.argmin(right)])]
            raise ValueError(f"pieces of {name} must cover its shape {list(shapes[name][0])} once")
        room = np.array([sizes[name] for name in self.files])[self.file]
        if (outside := (self.begin < 8) | (self.begin + 4 * self.numel > room)).any():
            row = int(np.argmax(outside))
            raise ValueError(
                f"a piece of {self.tensors[self.tensor[row]]} must lie within {self.files[self.file[row]]}"
            )

    def overlapping(self, tensor: str, shard: int, start: int, stop: int) -> range:
        """Rows of the pieces that have elements [start, stop) of a flattened shard."""
        low, high = self._rows[tensor]
        low, high = (low + int(np.searchsorted(self.shard[low:high], value)) for value in (shard, shard + 1))
        first = low + int(np.searchsorted(self.offset[low:high], start, side="right")) - 1
        return range(max(first, low), low + int(np.searchsorted(self.offset[low:high], stop)))

    def rows_of_files(self) -> dict[str, np.ndarray]:
        """The rows of each file's pieces, by its name; files without pieces are left out."""
        order = np.argsort(self.file, kind="stable")
        borders = np.searchsorted(self.file[order], np.arange(len(self.files) + 1))
        return {name: order[borders[number] : borders[number + 1]] for number, name in enumerate(self.files)}


def is_ordered(columns: Sequence[np.ndarray]) -> bool:
    """Whether rows [num_rows] of columns ascend, compared by the first column first."""
    equal: bool | np.ndarray = True
    for column in columns:
        if (equal & (column[1:] < column[:-1])).any():
            return False
        equal = equal & (column[1:] == column[:-1])
    return True


def numbers(values: np.ndarray) -> pa.Array:
    """As Arrow's array. Its own way from NumPy, or from a list, would import pandas: a third of a second."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def strings(values: Sequence[str]) -> pa.Array:
    """As Arrow's array; see `numbers`."""
    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(ends), pa.py_buffer(b"".join(encoded)))


def read_column(content: bytes, name: str) -> pa.Array:
    """One column of the table [num_pieces]."""
    table = pq.ParquetFile(io.BytesIO(content)).read(columns=[name])  # read_table would import pandas
    return table[name].combine_chunks()
