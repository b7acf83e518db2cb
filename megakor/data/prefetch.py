"""Shards fetched before they are asked for, in threads, without pushing out what is in use.

want(files, in the order of their turn) ─► ShardCache.path in threads ─► path(file) waits for it
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from megakor.data.cache import ShardCache
from megakor.data.indexed import FileRecord
from megakor.data.remote import RemoteFolder

Wanted = tuple[RemoteFolder, str, FileRecord]


class Prefetcher:
    """Fetches files that will be asked for soon, in threads of this process.

    Files fetched ahead and not yet asked for are at most half the cache, shared evenly by the processes of the node:
    the other half is for files in use (`max_open_bytes` of this process), so what was fetched ahead is not evicted
    before its turn. A file that is larger than its process's part is fetched when it is asked for.

    Args:
        cache: where the files go.
        num_threads: downloads at once.
        num_processes: of this node that share the cache.
    """

    def __init__(self, cache: ShardCache, num_threads: int = 4, num_processes: int = 1) -> None:
        self.cache = cache
        self.num_threads = num_threads
        self.max_open_bytes = self._budget = cache.max_bytes // (2 * num_processes)
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._mutex = threading.Lock()
        self._queue: dict[str, Wanted] = {}
        self._ahead: dict[str, tuple[Future[Path], int]] = {}  # begun and not asked for: the download, its bytes
        self._pool = ThreadPoolExecutor(self.num_threads, "prefetch")

    @property
    def bytes_fetched(self) -> int:
        """By this process, ahead or not."""
        return self.cache.bytes_fetched

    def want(self, files: Iterable[Wanted]) -> None:
        """The files that will be asked for next, in this order, instead of those named before."""
        self._check_process()
        with self._mutex:
            wanted = {record.sha256: (remote, name, record) for remote, name, record in files if not remote.is_local}
            self._ahead = {k: v for k, v in self._ahead.items() if k in wanted or not v[0].done()}
            self._queue = {k: v for k, v in wanted.items() if k not in self._ahead and v[2].size <= self._budget}
            self._advance()

    def path(self, remote: RemoteFolder, name: str, record: FileRecord) -> Path:
        """As `ShardCache.path`; waits for a download that has begun, and raises the error that it ended with."""
        self._check_process()
        with self._mutex:
            self._queue.pop(record.sha256, None)
            begun = self._ahead.pop(record.sha256, None)
            self._advance()
        if begun is not None and not begun[0].cancel():
            begun[0].result()
        return self.cache.path(remote, name, record)

    def close(self) -> None:
        """Forget what is wanted; waits for downloads that have begun."""
        self._check_process()
        with self._mutex:
            self._queue.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _advance(self) -> None:
        while self._queue:
            key, (remote, name, record) = next(iter(self._queue.items()))
            if sum(size for _, size in self._ahead.values()) + record.size > self._budget:
                return
            del self._queue[key]
            self._ahead[key] = self._pool.submit(self.cache.path, remote, name, record), record.size

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            self._begin()  # threads and their locks stay behind in a fork's parent
