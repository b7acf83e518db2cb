from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from megakor.data.cache import ShardCache
from megakor.data.indexed import FileRecord, map_tokens
from megakor.data.prefetch import Prefetcher
from megakor.data.remote import RemoteFolder
from tests.data.conftest import Bucket

SIZE = 1000


class Source:
    """Files in memory, and what was read of them."""

    def __init__(self, folder: str) -> None:
        self.remote = RemoteFolder(f"memory://{folder}/말뭉치", attempts=2, max_wait=0.01)

    def put(self, name: str, size: int = SIZE, seed: int | None = None) -> FileRecord:
        content = np.random.default_rng(hash(name) % 2**32 if seed is None else seed).bytes(size)
        with fsspec.open(f"{self.remote.url}/{name}", "wb") as file:
            file.write(content)
        return FileRecord(size, hashlib.sha256(content).hexdigest())


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path.name)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were fetched, in order."""
    names: list[str] = []
    fetch = RemoteFolder.fetch

    def counting(self: RemoteFolder, name: str, record: FileRecord, target: Path) -> None:
        names.append(name)
        fetch(self, name, record, target)

    monkeypatch.setattr(RemoteFolder, "fetch", counting)
    return names


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def held(cache: ShardCache) -> set[str]:
    """Names of all files in the cache, locks aside."""
    return {path.name for path in cache.folder.iterdir() if path.is_file()}


def wait(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_file_for_the_same_content(source: Source, tmp_path: Path, fetched: list[str]) -> None:
    cache = ShardCache(tmp_path / "새 cache", 10 * SIZE)
    record = source.put("a.bin", seed=1)
    assert source.put("copy.bin", seed=1) == record
    path = cache.path(source.remote, "a.bin", record)
    assert sha256(path) == record.sha256
    assert cache.path(source.remote, "copy.bin", record) == path
    again = pickle.loads(pickle.dumps(cache))
    assert again.path(source.remote, "a.bin", record) == path
    assert (fetched, held(cache), cache.bytes_fetched, again.bytes_fetched) == (["a.bin"], {record.sha256}, SIZE, 0)


def test_local_folders_need_no_cache(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1)
    record = FileRecord(3, "")
    assert cache.path(RemoteFolder(f"file://{tmp_path}/말"), "a.bin", record) == tmp_path / "말/a.bin"
    with pytest.raises(ValueError, match="must stay inside"):
        cache.path(RemoteFolder(str(tmp_path)), "../a.bin", record)
    assert held(cache) == set()


def test_a_damaged_file_is_fetched_again(source: Source, tmp_path: Path, fetched: list[str]) -> None:
    cache = ShardCache(tmp_path, 10 * SIZE)
    record = source.put("a.bin")
    path = cache.path(source.remote, "a.bin", record)
    path.write_bytes(path.read_bytes()[:-1])
    assert sha256(cache.path(source.remote, "a.bin", record)) == record.sha256
    assert len(fetched) == 2


def test_refused(source: Source, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, SIZE, key="data.cache_size")
    big = source.put("big.bin", SIZE + 1)
    with pytest.raises(ValueError, match=rf"^data\.cache_size={SIZE} must be at least {SIZE + 1}, the size of memory:"):
        cache.path(source.remote, "big.bin", big)
    with pytest.raises(ValueError, match=r"sha256='\.\./\.\./x' must be 64 hexadecimal digits"):
        cache.path(source.remote, "a.bin", FileRecord(1, "../../x"))
    with pytest.raises(ValueError, match=r"data\.cache_size=0 must be at least 1"):
        ShardCache(tmp_path, 0)


def test_an_error_leaves_nothing(source: Source, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 10 * SIZE)
    source.put("a.bin", seed=1)
    other = source.put("b.bin", seed=2)
    with pytest.raises(OSError, match=rf"a\.bin: sha256=.* must be {other.sha256}"):
        cache.path(source.remote, "a.bin", other)
    assert held(cache) == set()
    assert sha256(cache.path(source.remote, "b.bin", other)) == other.sha256


def test_eviction_order(source: Source, tmp_path: Path, fetched: list[str]) -> None:
    """The least recently used goes first, and no more than needed."""
    cache = ShardCache(tmp_path, 3 * SIZE)
    records = {name: source.put(name) for name in "abcde"}
    for name in "abcab":  # c is now the least recently used, then a
        cache.path(source.remote, name, records[name])
    assert fetched == list("abc")
    cache.path(source.remote, "d", records["d"])
    assert held(cache) == {records[name].sha256 for name in "abd"}
    cache.path(source.remote, "e", records["e"])
    assert held(cache) == {records[name].sha256 for name in "bde"}


def mapped(path: Path) -> np.ndarray:
    return map_tokens(path, np.dtype("<u2"), SIZE // 2, in_use=True)


def test_files_in_use_go_last(source: Source, tmp_path: Path) -> None:
    """As long as their map lives; and it stays readable where nothing else could go."""
    cache = ShardCache(tmp_path, 3 * SIZE)
    records = {name: source.put(name) for name in "abcdef"}
    tokens = {name: cache.use(source.remote, name, records[name], mapped) for name in "ab"}
    for name in "cd":
        cache.path(source.remote, name, records[name])
    assert held(cache) == {records[name].sha256 for name in "abd"}
    del tokens["a"]
    gc.collect()
    for name in "ef":
        cache.path(source.remote, name, records[name])
    assert held(cache) == {records[name].sha256 for name in "bef"}
    tokens |= {name: cache.use(source.remote, name, records[name], mapped) for name in "ef"}
    cache.path(source.remote, "a", records["a"])
    assert held(cache) == {records[name].sha256 for name in "aef"}
    assert hashlib.sha256(tokens["b"].tobytes()).hexdigest() == records["b"].sha256


def test_a_file_evicted_while_it_is_mapped(source: Source, tmp_path: Path, fetched: list[str]) -> None:
    """Whoever waits for the lock of a file that is being removed fetches it again."""
    cache = ShardCache(tmp_path, SIZE)
    record = source.put("a.bin")
    path = cache.path(source.remote, "a.bin", record)
    with path.open("rb") as evictor, ThreadPoolExecutor(1) as pool:
        fcntl.flock(evictor, fcntl.LOCK_EX)
        waiting = pool.submit(cache.use, source.remote, "a.bin", record, mapped)
        time.sleep(0.2)
        assert not waiting.done()
        path.unlink()
        fcntl.flock(evictor, fcntl.LOCK_UN)
        assert hashlib.sha256(waiting.result(10).tobytes()).hexdigest() == record.sha256
    assert fetched == ["a.bin", "a.bin"]


def test_use_begins_again_after_an_eviction(source: Source, tmp_path: Path, fetched: list[str]) -> None:
    cache = ShardCache(tmp_path, SIZE)
    record, evictions = source.put("a.bin"), iter([True, True, False])

    def read(path: Path) -> bytes:
        if next(evictions):
            path.unlink()  # as another process would
        return path.read_bytes()

    assert hashlib.sha256(cache.use(source.remote, "a.bin", record, read)).hexdigest() == record.sha256
    assert len(fetched) == 3
    with pytest.raises(FileNotFoundError, match="other"):
        cache.use(source.remote, "a.bin", record, lambda path: (path.parent / "other").read_bytes())


def test_smaller_than_the_working_set(source: Source, tmp_path: Path) -> None:
    """Threads read ten files in random orders through room for three, never exceeding it."""
    cache = ShardCache(tmp_path, 3 * SIZE)
    names = [str(number) for number in range(10)]
    records = {name: source.put(name) for name in names}
    largest, done = 0, threading.Event()

    def reader(seed: int) -> int:
        for name in np.random.default_rng(seed).permutation(names):
            content = cache.use(source.remote, name, records[name], Path.read_bytes)
            assert hashlib.sha256(content).hexdigest() == records[name].sha256
        return seed

    def watch() -> None:
        nonlocal largest
        while not done.is_set():
            with cache._lock("room"):  # else a listing may see a download and the file that it became
                largest = max(largest, cache._survey()[0])
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(reader, range(3))) == [0, 1, 2]
    done.set()
    watcher.join()
    assert 2 * SIZE < largest <= 3 * SIZE
    assert cache.bytes_fetched >= 10 * SIZE
    assert not any(name.endswith(".part") for name in held(cache))


def test_downloads_in_progress_count(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that needs the bytes reserved by another waits for it."""
    cache = ShardCache(tmp_path, 2 * SIZE - 1)
    first, second = source.put("a"), source.put("b")
    inside, go, events = threading.Event(), threading.Event(), []
    fetch = RemoteFolder.fetch

    def slow(self: RemoteFolder, name: str, record: FileRecord, target: Path) -> None:
        events.append(name)
        if name == "a":
            inside.set()
            assert go.wait(10)
            events.append("a done")
        fetch(self, name, record, target)

    monkeypatch.setattr(RemoteFolder, "fetch", slow)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(cache.path, source.remote, "a", first)
        assert inside.wait(10)
        two = pool.submit(cache.path, source.remote, "b", second)
        time.sleep(0.3)
        assert events == ["a"]
        go.set()
        one.result()
        assert sha256(two.result()) == second.sha256
    assert events == ["a", "a done", "b"]
    assert held(cache) == {second.sha256}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(source: Source, small_disk: Path) -> None:
    """Files of ours make room; where that is not enough, the error says how much is missing."""
    cache = ShardCache(small_disk / "cache", 1 << 30)
    records = {name: source.put(name, 100 << 10) for name in "abc"}
    for name in "abc":  # the disk holds two
        assert sha256(cache.path(source.remote, name, records[name])) == records[name].sha256
    assert held(cache) == {records[name].sha256 for name in "bc"}
    big = source.put("big", 300 << 10)
    with pytest.raises(OSError, match=rf"cache: disk full: memory://.*/big needs {300 << 10} bytes, \d+ are free") as e:
        cache.path(source.remote, "big", big)
    assert e.value.errno == errno.ENOSPC
    assert held(cache) == set()


def test_full_disk_where_nothing_may_be_mounted(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: list[str]
) -> None:
    cache = ShardCache(tmp_path, 1 << 20)
    first, second = source.put("a"), source.put("b")
    cache.path(source.remote, "a", first)
    sync, failures = os.fsync, [True, False]

    def full(descriptor: int) -> None:
        if failures and failures.pop(0):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr("megakor.data.remote.os.fsync", full)
    assert sha256(cache.path(source.remote, "b", second)) == second.sha256
    assert fetched == ["a", "b", "b"]


CHILD = """
import sys, time
from megakor.data.cache import ShardCache
from megakor.data.indexed import FileRecord
from megakor.data.remote import RemoteFolder
import megakor.data.remote
megakor.data.remote.CHUNK = 1 << 14
folder, url, name, size, sha256 = sys.argv[1:]
cache = ShardCache(folder, 1 << 20)
print("ready", flush=True)
sys.stdin.readline()
path = cache.path(RemoteFolder(url), name, FileRecord(int(size), sha256))
print(path.stat().st_size, cache.bytes_fetched)
"""


def child(folder: Path, bucket: Bucket, name: str, record: FileRecord) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(folder), bucket.url, name, str(record.size), record.sha256]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_four_processes_fetch_once(bucket: Bucket, tmp_path: Path) -> None:
    record = bucket.put("a.bin", 1 << 17)
    bucket.faults.gets.clear()
    processes = [child(tmp_path, bucket, "a.bin", record) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    answers = [process.communicate("go\n", timeout=60)[0].split() for process in processes]
    assert sorted(answers) == sorted([[str(record.size), "0"]] * 3 + [[str(record.size)] * 2])
    assert bucket.downloads("a.bin") == 8  # ranges, each once
    assert held(ShardCache(tmp_path, 1)) == {record.sha256}


def test_killed_while_downloading(bucket: Bucket, tmp_path: Path) -> None:
    """The next process that wants the file gets it whole, and nothing is left of the one that was killed."""
    record = bucket.put("a.bin", 1 << 18)
    bucket.faults.hanging = {"a.bin": 8}
    process = child(tmp_path, bucket, "a.bin", record)
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    part = tmp_path / f"{record.sha256}.{record.size}.part"
    wait(lambda: part.exists() and part.stat().st_size > 0, seconds=120)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 0 < part.stat().st_size < record.size
    bucket.faults.reset()
    cache = ShardCache(tmp_path, 1 << 20)
    assert sha256(cache.path(bucket.folder, "a.bin", record)) == record.sha256
    assert held(cache) == {record.sha256}


def test_leftovers_make_room(source: Source, tmp_path: Path) -> None:
    """A part whose lock nobody holds is removed, whatever it had reserved; the one of a download in progress stays."""
    cache = ShardCache(tmp_path, 2 * SIZE)
    left, busy = tmp_path / f"{'0' * 64}.{SIZE}.part", tmp_path / f"{'1' * 64}.{SIZE}.part"
    left.touch()
    busy.touch()
    with cache._lock("1" * 64):
        record = source.put("a.bin")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(cache.path, source.remote, "a.bin", record).result(10)
    assert held(cache) == {record.sha256, busy.name}


def test_prefetch(source: Source, tmp_path: Path, fetched: list[str]) -> None:
    """Half the cache is fetched ahead, in order, once each; asking moves it on."""
    prefetcher = Prefetcher(ShardCache(tmp_path, 6 * SIZE), num_threads=1)
    files = [(source.remote, name, source.put(name)) for name in "abcde"]
    big = (source.remote, "big", source.put("big", 4 * SIZE))
    prefetcher.want([*files[:1], *files[:3], big, *files[3:]])
    wait(lambda: fetched == list("abc"))
    time.sleep(0.1)
    assert fetched == list("abc")
    for file in files:
        assert sha256(prefetcher.path(*file)) == file[2].sha256
    assert sorted(fetched) == list("abcde")  # the last two at once, ahead and asked for
    assert prefetcher.bytes_fetched == 5 * SIZE
    assert sha256(prefetcher.path(*big)) == big[2].sha256  # too large to be fetched ahead
    prefetcher.close()


def test_prefetch_shares_its_half(source: Source, tmp_path: Path, fetched: list[str]) -> None:
    prefetcher = Prefetcher(ShardCache(tmp_path, 8 * SIZE), num_processes=4)
    prefetcher.want([(source.remote, name, source.put(name)) for name in "abc"])
    wait(lambda: bool(fetched))
    prefetcher.close()
    assert fetched == ["a"]


def test_a_new_plan_replaces_the_old(source: Source, tmp_path: Path, fetched: list[str]) -> None:
    prefetcher = Prefetcher(ShardCache(tmp_path, 4 * SIZE), num_threads=1)
    files = {name: (source.remote, name, source.put(name)) for name in "abcdef"}
    prefetcher.want([files[name] for name in "abcd"])
    wait(lambda: all(done.done() for done, _ in prefetcher._ahead.values()))
    prefetcher.want([files[name] for name in "bef"])  # a has left: e may be fetched
    wait(lambda: len(fetched) == 3)
    prefetcher.close()
    assert fetched == list("abe")


def test_prefetch_errors_come_out(source: Source, tmp_path: Path, fetched: list[str]) -> None:
    prefetcher = Prefetcher(ShardCache(tmp_path, 10 * SIZE))
    missing = (source.remote, "gone", FileRecord(SIZE, "0" * 64))
    prefetcher.want([missing])
    wait(lambda: bool(fetched))
    with pytest.raises(FileNotFoundError, match="gone: not there"):
        prefetcher.path(*missing)
    assert fetched == ["gone"]  # the error of the thread, not of a second try
    with pytest.raises(FileNotFoundError, match="gone: not there"):
        prefetcher.path(*missing)
    prefetcher.close()


def test_prefetcher_after_a_fork(source: Source, tmp_path: Path) -> None:
    """The threads stay in the parent; a child begins its own."""
    prefetcher = Prefetcher(ShardCache(tmp_path, 10 * SIZE))
    file = (source.remote, "a", source.put("a"))
    prefetcher.want([file])
    prefetcher.path(*file)
    prefetcher.want([file])
    prefetcher._pid = -1  # as seen by a child
    old = prefetcher._pool
    assert sha256(prefetcher.path(*file)) == file[2].sha256
    assert prefetcher._pool is not old
    old.shutdown()
    prefetcher.close()
