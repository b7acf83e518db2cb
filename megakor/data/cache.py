"""Remote shards on this machine's disk: fetched once, shared by all processes of a node, bounded in size.

    path(remote, name, record) ─► <folder>/<SHA-256>

The folder is all that processes share: `<SHA-256>` is a whole file, `<SHA-256>.<size>.part` a download and the bytes
that it has reserved, `locks/` a lock for each file and one for making room. The kernel frees the locks of a killed
process, so a .part whose lock is free is a leftover. A whole file that someone maps carries a shared lock, and goes
last. The folder must lie on a disk of the node, not on NFS.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from megakor.data.indexed import FileRecord
from megakor.data.remote import RemoteFolder
from megakor.files import sync

T = TypeVar("T")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
ROOM_SECONDS = 0.2  # between two looks whether other downloads have ended


class ShardCache:
    """Files by the SHA-256 of their content, the least recently used of which make room for new ones.

    Args:
        folder: made when it is not there; any number of processes of this machine may use it.
        max_bytes: of whole files and of downloads in progress together.
        key: configuration key of max_bytes, for errors.
    """

    def __init__(self, folder: str | Path, max_bytes: int, key: str = "data.cache_size") -> None:
        if max_bytes < 1:
            raise ValueError(f"{key}={max_bytes} must be at least 1")
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.key = key
        self.bytes_fetched = 0  # by this process
        self._counting = threading.Lock()
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)

    def __reduce__(self) -> tuple[type[ShardCache], tuple[Path, int, str]]:
        return ShardCache, (self.folder, self.max_bytes, self.key)

    def path(self, remote: RemoteFolder, name: str, record: FileRecord) -> Path:
        """A local file with the record's content, fetched if it is not here; of a local folder, the file itself.

        SHA-256 is compared as the file arrives, its size at each call. Another process may evict the file before it is
        opened; `use` begins again then. Files in use (`map_tokens`) are evicted last: only where they alone fill the
        cache. One of them stays readable: Linux keeps an unlinked file, and its bytes on the disk, until its last map
        has gone.

        ValueError when the file is larger than the cache; OSError as `RemoteFolder.fetch`, or for a full disk.
        """
        if remote.is_local:
            return remote.local_path(name)
        if not re.fullmatch("[0-9a-f]{64}", record.sha256):
            raise ValueError(f"{remote}/{name}: sha256={record.sha256!r} must be 64 hexadecimal digits")
        if record.size > self.max_bytes:
            raise ValueError(f"{self.key}={self.max_bytes} must be at least {record.size}, the size of {remote}/{name}")
        path = self.folder / record.sha256
        if not _touch(path, record.size):
            with self._lock(record.sha256):
                if not _touch(path, record.size):  # nobody fetched it while this process waited
                    self._fetch(remote, name, record, path)
        return path

    def use(self, remote: RemoteFolder, name: str, record: FileRecord, function: Callable[[Path], T]) -> T:
        """`function(path)`, which opens or maps the file, called again when the file was evicted in between."""
        while True:
            path = self.path(remote, name, record)
            try:
                return function(path)
            except FileNotFoundError:
                if remote.is_local or path.exists():
                    raise

    def _fetch(self, remote: RemoteFolder, name: str, record: FileRecord, path: Path) -> None:
        """Download beside `path`, then rename; the caller holds the file's lock."""
        part = self.folder / f"{record.sha256}.{record.size}.part"
        part.unlink(missing_ok=True)  # of a process that was killed
        try:
            try:
                self._make_room(record.size, part)
                remote.fetch(name, record, part)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                part.unlink(missing_ok=True)
                self._make_room(record.size, part, on_disk=True)
                remote.fetch(name, record, part)
            with self._lock("room"):  # whoever makes room sees the one or the other
                part.replace(path)
            sync(self.folder)
        except BaseException as error:
            part.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise OSError(
                    error.errno,
                    f"{self.folder}: disk full: {remote}/{name} needs {record.size} bytes, {self._free()} are free",
                ) from None
            raise
        with self._counting:
            self.bytes_fetched += record.size

    def _make_room(self, size: int, part: Path, on_disk: bool = False) -> None:
        """Evict until `size` more bytes fit, and reserve them by making `part`.

        `on_disk` evicts also until the disk itself has the room, or nothing is left to evict.
        """
        while True:
            with self._lock("room"):
                used, whole = self._survey()
                for path, num_bytes, in_use in [(*file, in_use) for in_use in (False, True) for file in whole]:
                    if used + size <= self.max_bytes and not (on_disk and self._free() < size):
                        break
                    if _evict(path, in_use):
                        used -= num_bytes
                if used + size <= self.max_bytes:
                    part.touch()
                    return
            time.sleep(ROOM_SECONDS)  # downloads of others fill the cache; once one has ended it may be evicted

    def _survey(self) -> tuple[int, list[tuple[Path, int]]]:
        """Bytes held and reserved, and (path, bytes) of whole files, the least recently used first."""
        used, whole = 0, []
        for path in self.folder.iterdir():
            name, _, rest = path.name.partition(".")
            if rest.endswith("part"):
                if not self._leftover(name, path):
                    used += int(rest.split(".")[0])
            elif path.is_file():
                state = path.stat()
                whole.append((state.st_mtime_ns, state.st_size, path))
                used += state.st_size
        return used, [(path, size) for _, size, path in sorted(whole)]

    def _free(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _leftover(self, sha256: str, part: Path) -> bool:
        """Whether no process is downloading `part` any more; it is removed then."""
        try:
            with self._lock(sha256, wait=False):
                part.unlink(missing_ok=True)
                return True
        except Timeout:
            return False

    def _lock(self, name: str, wait: bool = True) -> FileLock:
        return FileLock(self.folder / "locks" / f"{name}.lock", timeout=-1 if wait else 0)


def _evict(path: Path, in_use: bool) -> bool:
    """Remove a file, unless it is in use and `in_use` does not allow that. Whether it has gone by this call."""
    try:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a map that waits for it finds the file gone
            except BlockingIOError:
                if not in_use:
                    return False
            path.unlink()
    except FileNotFoundError:
        return False
    return True


def _touch(path: Path, size: int) -> bool:
    """Note the use of a file. Whether it is there with this size; one with another was cut by something else."""
    try:
        if path.stat().st_size != size:
            return False
        now = time.time_ns()  # the kernel's own would be equal for uses within some milliseconds
        os.utime(path, ns=(now, now))
    except FileNotFoundError:
        return False
    return True
