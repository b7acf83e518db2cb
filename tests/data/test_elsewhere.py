"""A run whose shards are elsewhere: the same stream, over faults, and each node fetches its part of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from megakor.data.source import Source
from tests.data.conftest import Bucket
from tests.data.test_stream import equal, made, whole
from tests.data.tokens import write_shards

LENGTH = 16


def write_source(folder: Path, num_shards: int, num_samples: int, first: int = 0) -> Path:
    """Shards of so many whole samples, whose tokens count up from `first`."""
    folder.mkdir()
    size = num_samples * LENGTH + 1
    starts = [(first + shard * size) % 59_000 for shard in range(num_shards)]
    write_shards(folder, [[[start + token for token in range(size)]] for start in starts])
    return folder


def upload(folder: Path, url: str) -> None:
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.pipe({f"{path}/{file.name}": file.read_bytes() for file in folder.iterdir()})


def test_from_s3_over_faults(bucket: Bucket, tmp_path: Path) -> None:
    """A twentieth of the requests fail, objects break off or come damaged: nothing is lost, nothing comes twice."""
    local = write_source(tmp_path / "here", 12, 20)
    upload(local, bucket.url)
    cache = str(tmp_path / "cache")
    bucket.faults.gets.clear()
    bucket.faults.failing = 0.05
    bucket.faults.truncated = {"shard-00003.bin": 2}
    bucket.faults.corrupt = {"shard-00004.bin": 1, "shard-00005.bin": 1}
    keys = {"sequence_length": LENGTH, "global_batch_size": 12, "num_streams": 4}
    here, there = made(local, **keys), made(bucket.url, **keys, cache=cache)
    for step in range(20):  # an epoch, and begun again
        assert equal(whole(there, step, 2), whole(here, step))
    assert there.files is not None
    assert there.files.bytes_fetched == sum(path.stat().st_size for path in local.glob("*.bin"))  # each once
    assert bucket.faults.counts["truncated"] == 2
    assert bucket.faults.counts["corrupt"] == 2
    again = made(bucket.url, **keys, cache=cache)
    assert equal(whole(again, 7), whole(here, 7))
    assert again.files is not None
    assert again.files.bytes_fetched == 0  # warm
    there.files.close()
    again.files.close()


def test_a_cache_that_holds_a_fraction(bucket: Bucket, tmp_path: Path) -> None:
    local = write_source(tmp_path / "here", 12, 20)
    upload(local, bucket.url)
    size = (local / "shard-00000.bin").stat().st_size
    keys = {"sequence_length": LENGTH, "global_batch_size": 12, "num_streams": 2, "shuffle_window": 40}
    here, there = made(local, **keys), made(bucket.url, **keys, cache=str(tmp_path / "cache"), cache_size=5 * size)
    for step in range(20):
        assert equal(whole(there, step), whole(here, step))
        assert bytes_on_disk(tmp_path / "cache") <= 5 * size
    there.close()


def bytes_on_disk(cache: Path) -> int:
    """Of a cache's files, those too that are removed and still mapped by this process."""
    files = {path.stat().st_ino: path.stat().st_size for path in cache.glob("?" * 64)}
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            if str(descriptor.readlink()).startswith(f"{cache}/") and not descriptor.is_dir():
                state = descriptor.stat()
                files[state.st_ino] = state.st_size
        except FileNotFoundError:  # the descriptor that lists them
            continue
    return sum(files.values())


def test_nothing_is_fetched_past_the_end(bucket: Bucket, tmp_path: Path) -> None:
    """The last steps of a run that uses its source up."""
    local = write_source(tmp_path / "here", 8, 40)
    upload(local, bucket.url)
    keys: dict[str, Any] = {"sequence_length": LENGTH, "global_batch_size": 32, "num_steps": 8, "max_epochs": {"": 1}}
    here, there = made(local, **keys), made(bucket.url, **keys, cache=str(tmp_path / "cache"))
    assert here.mixture.end is not None
    for step in range(8):
        assert equal(whole(there, step), whole(here, step))
    there.close()


NUM_STREAMS = 16


def fetched(sources: dict[str, Path], tmp_path: Path, num_nodes: int, size: int, num_steps: int) -> list[float]:
    """The part of all bytes that each node fetches in so many steps of `size` samples; their rows are compared."""
    urls = {name: f"memory://{tmp_path.name}/{name}" for name in sources}
    for name, folder in sources.items():
        upload(folder, urls[name])
    keys = {"sequence_length": LENGTH, "global_batch_size": size, "num_streams": NUM_STREAMS, "shuffle_window": 64,
            "num_steps": num_steps}  # fmt: skip
    expected, parts = made(sources, **keys), []
    for node in range(num_nodes):
        stream = made(urls, **keys, cache=str(tmp_path / f"cache-{node}"))
        for step in range(num_steps):
            (batch,) = stream.micro_batches(step, node, num_nodes, size // num_nodes)
            if step % 16 == 0:
                (whole_batch,) = expected.micro_batches(step, 0, 1, size)
                part = slice(node * size // num_nodes, (node + 1) * size // num_nodes)
                assert np.array_equal(batch.input_ids, whole_batch.input_ids[part])
        stream.close()
        assert stream.files is not None
        parts.append(stream.files.bytes_fetched)
    total = sum(path.stat().st_size for folder in sources.values() for path in folder.glob("*.bin"))
    print(
        f"{len(sources)} sources, batch {size}: {num_nodes} nodes fetched",
        ", ".join(f"{count:,} B ({count / total:.3f})" for count in parts),
    )
    return [count / total for count in parts]


@pytest.mark.parametrize("num_nodes", [1, 2, 4, 8])
@pytest.mark.parametrize("num_shards", [[64], [60], [40, 24]])
def test_each_node_fetches_its_part(tmp_path: Path, num_shards: list[int], num_nodes: int) -> None:
    """Within an epoch a node fetches at most its part of the bytes, and a shard more for each of its streams' borders.

    A source's part of each batch is a whole number of rounds of the streams here.
    """
    sources = {f"s{n}": write_source(tmp_path / f"s{n}", count, 32, 7 * n) for n, count in enumerate(num_shards)}
    size = 2 * NUM_STREAMS if len(sources) == 1 else 8 * NUM_STREAMS
    parts = fetched(sources, tmp_path, num_nodes, size, sum(num_shards) * 32 // size - 1)
    margin = len(sources) * (NUM_STREAMS // num_nodes + 1) / sum(num_shards)
    assert sum(parts) > 0.95  # the last windows are not read to their end
    assert all(part <= 1 / num_nodes + margin for part in parts)


def test_nodes_fetch_more_where_a_batch_is_no_whole_round(tmp_path: Path) -> None:
    """Half a round a step: its rows are of other streams each time, and a node's run of them is not its own."""
    parts = fetched({"s": write_source(tmp_path / "s", 64, 32)}, tmp_path, 8, NUM_STREAMS // 2, 256)
    assert 2 / 8 < max(parts) < 5 / 8


def test_nowhere_to_fetch_to(bucket: Bucket, tmp_path: Path) -> None:
    upload(write_source(tmp_path / "here", 1, 3), bucket.url)
    with pytest.raises(
        ValueError, match=r"data\.cache \(evaluate: cache\) must name a folder of this machine for the shards of s3://"
    ):
        Source(bucket.url)


def test_a_source_that_is_not_there(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"s3://\w+/말뭉치 a/manifest\.json"):
        made(bucket.url, cache=str(tmp_path))
