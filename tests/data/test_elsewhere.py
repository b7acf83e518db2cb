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


def write_source(folder: Path, num_shards: int, num_samples: int) -> Path:
    """Shards of so many whole samples; every token of the source is another."""
    folder.mkdir()
    size = num_samples * LENGTH + 1
    write_shards(folder, [[[shard * size % 59_000 + token for token in range(size)]] for shard in range(num_shards)])
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


@pytest.mark.parametrize("num_nodes", [1, 2, 4, 8])
def test_each_node_fetches_its_part(tmp_path: Path, num_nodes: int, record_property: pytest.FixtureRequest) -> None:
    """Over an epoch a node fetches its part of the bytes, and at most a shard more for each of its streams' borders."""
    num_shards, num_samples, num_streams = 64, 32, 16
    url = f"memory://{tmp_path.name}"
    upload(write_source(tmp_path / "here", num_shards, num_samples), url)
    keys = {"sequence_length": LENGTH, "global_batch_size": 32, "num_streams": num_streams, "shuffle_window": 64,
            "num_steps": num_shards * num_samples // 32}  # fmt: skip
    expected = made(tmp_path / "here", **keys)
    fetched = []
    for node in range(num_nodes):
        stream = made(url, **keys, cache=str(tmp_path / f"cache-{node}"))
        for step in range(num_shards * num_samples // 32):
            (batch,) = stream.micro_batches(step, node, num_nodes, 32 // num_nodes)
            if step % 16 == 0:
                (whole_batch,) = expected.micro_batches(step, 0, 1, 32)
                part = slice(node * 32 // num_nodes, (node + 1) * 32 // num_nodes)
                assert np.array_equal(batch.input_ids, whole_batch.input_ids[part])
        assert stream.files is not None
        fetched.append(stream.files.bytes_fetched)
        stream.files.close()
    total = sum(path.stat().st_size for path in (tmp_path / "here").glob("*.bin"))
    margin = (num_streams // num_nodes + 1) / num_shards
    parts = [count / total for count in fetched]
    print(
        f"{num_nodes} nodes fetched",
        ", ".join(f"{count:,} B ({part:.3f})" for count, part in zip(fetched, parts, strict=True)),
    )
    assert all(1 / num_nodes <= part <= 1 / num_nodes + margin for part in parts)


def test_nowhere_to_fetch_to(bucket: Bucket, tmp_path: Path) -> None:
    upload(write_source(tmp_path / "here", 1, 3), bucket.url)
    with pytest.raises(ValueError, match=r"data\.cache must name a folder of this machine for the shards of s3://"):
        Source(bucket.url)


def test_a_source_that_is_not_there(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"s3://\w+/말뭉치 a/manifest\.json"):
        made(bucket.url, cache=str(tmp_path))
