"""Ranks that are killed, again and again, and go on in other numbers."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.conftest import KEYS, Bucket
from tests.data.killed import rows, run_rank
from tests.data.test_elsewhere import LENGTH, upload, write_source
from tests.data.test_stream import made
from tests.ranks import context

NUM_KILLS = 50
NUM_STEPS = 10_000


def test_killed_fifty_times_and_resumed_on_other_ranks(bucket: Bucket, tmp_path: Path) -> None:
    """Processes that share too small a cache die by SIGKILL, also in downloads: what is seen stays the same.

    Each time another number of ranks goes on, with other micro-batches, from a step that all had finished.
    """
    local, remote = {}, {}
    for first, name in enumerate(("ㄱ", "ㄴ")):
        local[name] = write_source(tmp_path / name, 12, 20, first)
        remote[name] = f"{bucket.url}/{name}"
        upload(local[name], remote[name])
    bucket.faults.slow = {".bin": 0.03}
    size = (local["ㄱ"] / "shard-00000.bin").stat().st_size
    keys: dict[str, Any] = {
        "sequence_length": LENGTH, "global_batch_size": 12, "num_streams": 4, "shuffle_window": 40,
        "weights": {"ㄱ": 1.0, "ㄴ": 2.0}, "batch_sizes": {200: 7}, "skip": [[300, 350]], "num_steps": NUM_STEPS,
    }  # fmt: skip
    there = {**keys, "cache": str(tmp_path / "cache"), "cache_size": 9 * size}
    environment = {key: os.environ[key] for key in (*KEYS, "AWS_ENDPOINT_URL")}
    processes = context()
    whole, generator = made(local, **keys), np.random.default_rng(7)
    start, dp_size, compared, in_downloads, resumed_on = 0, 1, 0, 0, set()
    for kill in range(NUM_KILLS):
        dp_size = int(generator.choice([other for other in range(1, 6) if other != dp_size]))
        micro, out = int(generator.integers(1, 4)), tmp_path / f"life-{kill}"
        out.mkdir()
        ranks = [
            processes.Process(target=run_rank, args=(environment, remote, there, out, start, number, dp_size, micro))
            for number in range(dp_size)
        ]
        for process in ranks:
            process.start()
        reached = [out / f"{start + int(generator.integers(0, 4))}-{number}" for number in range(dp_size)]
        patience = time.monotonic() + float(generator.choice([0.5, 60]))  # some die before they have done a step
        while not all(path.exists() for path in reached) and time.monotonic() < patience:
            time.sleep(0.002)
        time.sleep(float(generator.uniform(0, 0.02)))
        for number in generator.permutation(dp_size):
            ranks[number].kill()
        for process in ranks:
            process.join()
            assert process.exitcode == -9
        in_downloads += any((tmp_path / "cache").glob("*.part"))
        end = start
        while all((out / f"{end}-{number}").exists() for number in range(dp_size)):
            parts = [(out / f"{end}-{number}").read_bytes() for number in range(dp_size)]
            assert b"".join(parts) == rows(whole, end), (kill, end, dp_size)
            end += 1
            compared += 1
        resumed_on |= {dp_size} if end > start else set()
        start = int(generator.integers(start, end + 1))
    print(f"{NUM_KILLS} kills, {in_downloads} in downloads; {compared} steps compared, {start} reached")
    assert resumed_on == {1, 2, 3, 4, 5}
    assert in_downloads > 5
    assert compared > NUM_KILLS
