"""A stream of 10^9 samples over 10^5 shards is entered anywhere at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from megakor.data.manifest import Manifest, write_manifest
from megakor.data.shards import COUNTS, SCHEMA, SUFFIXES, Shards

NUM_SHARDS, SAMPLES_OF_SHARD, LENGTH = 100_000, 10_000, 2048
MOST_SECONDS, MOST_BYTES = 2.0, 200e6

ENTER = """
import json, sys, time
from pathlib import Path
from types import SimpleNamespace
from megakor.config.schema import DataConfig, TrainConfig
from megakor.data.stream import pretrain_stream
data = DataConfig(train=sys.argv[1], tokenizer="unused")
train = TrainConfig(num_steps=1, global_batch_size=1024, micro_batch_size=1, sequence_length=2048)
stream = pretrain_stream(data, train, SimpleNamespace(eod_id=0, vocab_size=30_000), Path("no run"))
rows = stream.rows(976_000)  # in the first of 10^6 / 1.024 steps' last thousandth
seconds = time.process_time()  # since the process began; other tests are on the other core
status = dict(line.split(":") for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) * 1024
samples = stream.orders[0].num_samples
print(json.dumps({"seconds": seconds, "bytes": peak, "samples": samples, "shards": len(set(rows.shards.tolist()))}))
"""


def write_synthetic(folder: Path) -> None:
    """A manifest of shards that are not there."""
    generator = np.random.default_rng(1)
    columns = {name: np.full(NUM_SHARDS, SAMPLES_OF_SHARD * LENGTH + 1) for name in COUNTS}
    digests = pa.array([generator.bytes(32) for _ in range(NUM_SHARDS)], pa.binary(32))
    columns["prefix"] = [f"part-{number // 1000:03d}/shard-{number:06d}" for number in range(NUM_SHARDS)]
    columns["text_sha256"] = digests
    for name in SUFFIXES:
        columns[f"{name}_size"] = columns["num_tokens"] * 2
        columns[f"{name}_sha256"] = digests
    columns["sources"] = [["web", "뉴스"]] * NUM_SHARDS
    table = pa.table({field.name: pa.array(columns[field.name], field.type) for field in SCHEMA}, SCHEMA)
    write_manifest(folder, Manifest("fingerprint", 30_000, 0, "uint16", 20_000_000, Shards(table)))


def test_a_billion_samples(tmp_path: Path) -> None:
    write_synthetic(tmp_path)
    done = subprocess.run([sys.executable, "-c", ENTER, str(tmp_path)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["samples"] == 10**9
    assert 64 <= found["shards"] <= 64 * (65536 // SAMPLES_OF_SHARD + 2)  # of 10^5: a window's, for each stream
    assert found["seconds"] < MOST_SECONDS
    assert found["bytes"] < MOST_BYTES
