"""A folder of shards anywhere: on this machine, or at any address that fsspec knows (s3://, gs://, hf://, memory://).

    RemoteFolder.sizes ─► one listing      .read ─► bytes of a small file      .fetch ─► a whole, checked local file

What may pass is tried again with growing, random pauses; what will not (not found, not permitted) fails at once. Every
failure is one error that names the address, and no error shows a secret.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from megakor.data.failures import explained, may_pass, status_of, without_secrets
from megakor.data.indexed import FileRecord

T = TypeVar("T")
CHUNK = 4 << 20  # bytes of one request
NUM_CHUNKS = 4  # requests at once for one file: a single connection rarely fills a network card


class Damaged(OSError):
    """What came is not what the record says; another try may bring it whole."""


@dataclass(frozen=True, repr=False)
class RemoteFolder:
    """A folder by its path or URL; holds no connection, so it may be pickled and used after a fork.

    Attributes:
        url: a local path, or an address with `://`. Keys and endpoints come from the environment (AWS_ENDPOINT_URL …).
        attempts: at most, for each request, and for a file whose SHA-256 is wrong.
        max_wait: seconds, the longest pause between two attempts; the first is up to half a second.
    """

    url: str
    attempts: int = 6
    max_wait: float = 30.0

    def __str__(self) -> str:
        return without_secrets(self.url)

    __repr__ = __str__

    @property
    def protocol(self) -> str:
        return self.url.split("://", 1)[0] if "://" in self.url else "file"

    @property
    def is_local(self) -> bool:
        return self.protocol in ("file", "local")

    @property
    def local_root(self) -> Path:
        assert self.is_local
        return Path(self.url.split("://", 1)[-1])

    def local_path(self, name: str) -> Path:
        """Where a file of a local folder lies. ValueError when the name leaves the folder."""
        return self.local_root / _inside(name)

    def read(self, name: str) -> bytes:
        """A small file's content."""
        return self._request(name, lambda filesystem, path: filesystem.cat_file(path))

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below the folder, by its name relative to it. FileNotFoundError when there is none."""

        def listing(filesystem: Any, path: str) -> dict[str, int]:
            filesystem.invalidate_cache(path)
            found = filesystem.find(path, detail=True)
            return {key[len(path) :].lstrip("/"): int(entry["size"]) for key, entry in found.items()}

        found = {name: size for name, size in self._request("", listing).items() if name}
        if not found:
            raise FileNotFoundError(f"{self}: must hold files, and none is there")
        return found

    def fetch(self, name: str, record: FileRecord, target: Path) -> None:
        """Write the file to `target`, synced to the disk, once its size and SHA-256 have proven equal to the record's.

        After an error the target is to be thrown away. OSError naming expected and actual size or SHA-256 when the
        content stays another; FileNotFoundError, PermissionError; errors of the local disk as they are.
        """
        path = _inside(name)
        for attempt in self._retrying(lambda error: isinstance(error, Damaged)):
            with attempt, target.open("wb") as file:
                digest = hashlib.sha256()
                for block in self._blocks(path, record.size):
                    digest.update(block)
                    file.write(block)
                if digest.hexdigest() != record.sha256:
                    raise Damaged(f"{self}/{name}: sha256={digest.hexdigest()} must be {record.sha256}: changed")
                file.flush()
                os.fsync(file.fileno())

    def _blocks(self, name: str, size: int) -> Iterator[bytes]:
        """A file's content in order; a request that fails is repeated, not those before it."""
        for first in range(0, size, CHUNK * NUM_CHUNKS):
            starts = list(range(first, min(first + CHUNK * NUM_CHUNKS, size), CHUNK))
            # The last request asks for a byte too many: a file that has grown gives itself away.
            ends = [start + CHUNK if start + CHUNK < size else size + 1 for start in starts]
            yield from self._request(name, partial(_ranges, starts, ends, size))

    def _request(self, name: str, function: Callable[[Any, str], T], writes: bool = False) -> T:
        """`function(filesystem, path)`, tried again while its failure may pass; one clear error in the end."""
        filesystem, root = self._open()
        path = f"{root.rstrip('/')}/{_inside(name)}" if name else root
        try:
            return self._retrying(may_pass)(function, filesystem, path)
        except Exception as error:
            # Not chained: the first error's own text may show the secret.
            raise explained(error, self.url, name, writes) from None

    def _open(self) -> tuple[Any, str]:
        import fsspec.core  # costs a tenth of a second; who reads local files by their paths does without

        if self.is_local:
            return fsspec.filesystem("file"), os.path.abspath(self.local_root)
        try:
            filesystem, path = fsspec.core.url_to_fs(self.url)
        except Exception as error:
            raise explained(error, self.url) from None  # whatever it is, and without its secrets, as above
        if getattr(filesystem, "retries", 1) > 1:
            filesystem.retries = 1  # or its attempts and ours would multiply
        return filesystem, path

    def _retrying(self, again: Callable[[BaseException], bool]) -> Retrying:
        return Retrying(
            stop=stop_after_attempt(self.attempts),
            wait=wait_random_exponential(multiplier=0.5, max=self.max_wait),
            retry=retry_if_exception(again),
            reraise=True,
        )


def _ranges(starts: list[int], ends: list[int], size: int, filesystem: Any, path: str) -> list[bytes]:
    """Ranges of a file of `size` bytes, fetched at once. Damaged when one is not as long as it must be."""
    blocks = filesystem.cat_ranges([path] * len(starts), starts, ends, on_error="return")
    for start, end, block in zip(starts, ends, blocks, strict=True):
        if isinstance(block, BaseException):
            if status_of(block) != 416:  # the range begins past the file's end
                raise block
            block = b""
        if start + len(block) != min(end, size):
            if start + len(block) > size:
                actual = f"size={filesystem.size(path)}"
            else:
                actual = f"only {len(block)} of bytes {start} … {min(end, size)} came; size={filesystem.size(path)}"
            raise Damaged(f"{actual} must be {size}: truncated or changed")
    return blocks


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ValueError(f"name={name!r} must stay inside its folder")
    return name
