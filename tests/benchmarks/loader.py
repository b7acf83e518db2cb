"""Loading speed: megakor's stream, Megatron's GPTDataset, litdata and Hugging Face `datasets`, on the same tokens.

    python -m tests.benchmarks.loader [--rounds 7] [--loader litdata …] [--profile]

Each gives shuffled micro-batches of 8 × 2,048 tokens as int64 tensors of inputs and labels, in one process without
workers, from files that the page cache holds. They take turns, so that a busy machine slows all of them alike; figures
are medians over the rounds. Each reads the format that is its own: megakor, whose steps have 256 samples, and Megatron
the same .bin/.idx, litdata its chunks of tokens, `datasets` Parquet with a row for each document, packed as the
examples of `transformers` do it; `datasets_packed` is given rows that are cut to 2,049 tokens already. What they give
is compared first: every token of the set, once in an epoch (but for ends that a loader drops).

`s3`: the same stream from an S3 server on loopback, over failed requests and broken objects, its cache warm, against
the local one. `share_of_a100_step`: processor time of loading a micro-batch of one sequence over the time that a 1.3B
model takes for it on an A100 at 45 % of 312 TFLOP/s. Memory: resident size of a process that loads, less that of one
that has only imported what it needs. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import json
import os
import pstats
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megakor.config.compose import load_experiment
from megakor.config.schema import DataConfig, TrainConfig
from megakor.data.stream import PretrainStream, pretrain_stream
from megakor.model.flops import train_flops_per_token
from tests.benchmarks.train_step import seconds
from tests.data.tokens import write_shards
from tests.ranks import run_ranks
from tests.resident import resident_size

LENGTH, MICRO_BATCH, GLOBAL_BATCH = 2048, 8, 256
NUM_SHARDS, SAMPLES_OF_SHARD = 8, 1024
VOCABULARY, EOD = 30_000, 0
BATCHES_OF_TURN = {"datasets": 16}
"""Of a loader that takes long; of the others `MANY`."""
MANY = 512
A100_FLOPS = 0.45 * 312e12
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""Inputs and labels [8, 2048], without end."""


def documents(shard: int) -> list[list[int]]:
    """A shard's documents, some hundred tokens each, closed by the end token."""
    generator = np.random.default_rng(shard)
    tokens = generator.integers(1, VOCABULARY, SAMPLES_OF_SHARD * LENGTH + 1).astype(np.uint16)
    cuts = np.sort(generator.choice(len(tokens), len(tokens) // 600, replace=False))
    tokens[cuts - 1] = EOD
    return [part.tolist() for part in np.split(tokens, cuts) if len(part)]


def samples(shard: int) -> np.ndarray:
    """The same tokens as rows: uint16 [samples, length + 1]."""
    tokens = np.concatenate([np.array(part, np.uint16) for part in documents(shard)])
    return np.stack([tokens[start : start + LENGTH + 1] for start in range(0, len(tokens) - 1, LENGTH)])


def stream(folder: str, **keys: Any) -> PretrainStream:
    train = TrainConfig(
        num_steps=1, global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH, sequence_length=LENGTH
    )
    data = DataConfig(train=folder, tokenizer="unused", **keys)
    return pretrain_stream(data, train, SimpleNamespace(eod_id=EOD, vocab_size=VOCABULARY), Path("no run"))


def batches_of(made: PretrainStream) -> Batches:
    step = 0
    while True:
        for batch in made.micro_batches(step, 0, 1, MICRO_BATCH):
            yield torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
        step += 1


def megakor(folder: Path) -> Batches:
    yield from batches_of(stream(str(folder / "shards")))


def megatron(folder: Path) -> Batches:
    """GPTDataset under torch's DataLoader; its indices are built before the first batch."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    num_samples = NUM_SHARDS * SAMPLES_OF_SHARD
    config = GPTDatasetConfig(
        random_seed=1234, sequence_length=LENGTH, split="1,0,0", path_to_cache=str(folder / "megatron"),
        tokenizer=SimpleNamespace(vocab_size=VOCABULARY, eod=EOD, unique_identifiers={"class": "none"}),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        blend=([str(folder / "one")], None),
    )  # fmt: skip
    tokens = IndexedDataset(str(folder / "one"))
    indices = np.arange(tokens.document_indices.shape[0] - 1, dtype=np.int32)
    dataset = GPTDataset(tokens, str(folder / "one"), indices, num_samples, Split.train, config)
    while True:
        for batch in torch.utils.data.DataLoader(dataset, batch_size=MICRO_BATCH, drop_last=True):
            yield batch["tokens"], batch["labels"]


def litdata(folder: Path) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    dataset = StreamingDataset(
        str(folder / "litdata"), item_loader=TokensLoader(block_size=LENGTH + 1), shuffle=True, drop_last=True
    )
    while True:
        for batch in StreamingDataLoader(dataset, batch_size=MICRO_BATCH, num_workers=0):
            wide = batch.long()
            yield wide[:, :-1], wide[:, 1:]


def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """Documents laid end to end and cut into rows, as the examples of `transformers` do it."""
    joined = list(itertools.chain(*examples["tokens"]))
    stop = len(joined) // (LENGTH + 1) * (LENGTH + 1)
    return {"tokens": [joined[start : start + LENGTH + 1] for start in range(0, stop, LENGTH + 1)]}


def datasets(folder: Path) -> Batches:
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=f"{folder}/documents/*.parquet", split="train", streaming=True)
    yield from shuffled_rows(rows.map(group_texts, batched=True, batch_size=1000))


def datasets_packed(folder: Path) -> Batches:
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=f"{folder}/parquet/*.parquet", split="train", streaming=True)
    yield from shuffled_rows(rows)


def shuffled_rows(rows: Any) -> Batches:
    epoch = 0
    while True:
        shuffled = rows.shuffle(seed=1234 + epoch, buffer_size=1000).with_format("torch")
        for batch in shuffled.iter(batch_size=MICRO_BATCH, drop_last_batch=True):
            wide = batch["tokens"].long()
            yield wide[:, :-1], wide[:, 1:]
        epoch += 1


LOADERS: dict[str, Callable[[Path], Batches]] = {
    "megakor": megakor, "megatron": megatron, "litdata": litdata, "datasets": datasets,
    "datasets_packed": datasets_packed,
}  # fmt: skip


def write(folder: Path) -> None:
    """The same tokens in every loader's own format."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from litdata import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    (folder / "shards").mkdir()
    write_shards(folder / "shards", [documents(shard) for shard in range(NUM_SHARDS)], eod_id=EOD)
    write_shards(folder, [[part for shard in range(NUM_SHARDS) for part in documents(shard)]], eod_id=EOD)
    for suffix in ("bin", "idx"):
        (folder / f"shard-00000.{suffix}").rename(folder / f"one.{suffix}")
    (folder / "parquet").mkdir()
    (folder / "documents").mkdir()
    (folder / "litdata").mkdir()
    writer = BinaryWriter(str(folder / "litdata"), chunk_size=64 * (LENGTH + 1), item_loader=TokensLoader(LENGTH + 1))
    number = 0
    for shard in range(NUM_SHARDS):
        rows = samples(shard)
        kind = pa.list_(pa.uint16(), LENGTH + 1)
        column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), type=kind)
        pq.write_table(pa.table({"tokens": column}), folder / "parquet" / f"{shard}.parquet", row_group_size=256)
        table = pa.table({"tokens": pa.array(documents(shard), pa.list_(pa.uint16()))})
        pq.write_table(table, folder / "documents" / f"{shard}.parquet")
        for row in rows:
            writer.add_item(number, torch.from_numpy(row.astype(np.int32)))
            number += 1
    writer.done()
    writer.merge()


def check(name: str, loader: Batches) -> None:
    """An epoch of a loader has the labels of the set. ValueError where more than a hundredth are missing or others."""
    expected = np.zeros(VOCABULARY, np.int64)
    for shard in range(NUM_SHARDS):
        expected += np.bincount(samples(shard)[:, 1:].ravel(), minlength=VOCABULARY)
    found = np.zeros_like(expected)
    for _ in range(NUM_SHARDS * SAMPLES_OF_SHARD // MICRO_BATCH):
        inputs, labels = next(loader)
        assert inputs.shape == labels.shape == (MICRO_BATCH, LENGTH), (name, inputs.shape)
        assert torch.equal(inputs[:, 1:], labels[:, :-1]), name
        found += np.bincount(labels.numpy().ravel(), minlength=VOCABULARY)
    wrong = np.abs(found - expected).sum() / expected.sum()
    if wrong > 0.01:
        raise ValueError(f"{name}: {wrong:.1%} of an epoch's labels are not those of the set")


def memory(name: str, folder: Path) -> int:
    """Bytes that a process grows by when it loads a turn of batches, its packages imported; on a rank of its own."""
    with suppress(Exception):  # there is nothing; by then it has imported what it needs
        next(LOADERS[name](Path("nowhere")))
    before = resident_size()
    loader = LOADERS[name](folder)
    drain(loader, BATCHES_OF_TURN.get(name, MANY))
    return resident_size() - before


@contextmanager
def from_s3(folder: Path) -> Iterator[Batches]:
    """The stream from a server at which requests fail; its first epoch has filled the cache."""
    import fsspec

    from tests.data.conftest import KEYS
    from tests.data.faulty import s3_server

    with s3_server() as (address, faults):
        os.environ |= {**KEYS, "AWS_ENDPOINT_URL": address}
        files = fsspec.filesystem("s3")
        files.mkdir("bench")
        files.pipe({f"bench/shards/{path.name}": path.read_bytes() for path in (folder / "shards").iterdir()})
        faults.failing, faults.truncated, faults.corrupt = 0.05, {"shard-00003.bin": 2}, {"shard-00005.bin": 1}
        made = stream("s3://bench/shards", cache=str(folder / "cache"))
        loader = batches_of(made)
        for _ in range(NUM_SHARDS * SAMPLES_OF_SHARD // MICRO_BATCH):
            next(loader)
        assert (faults.counts["truncated"], faults.counts["corrupt"]) == (2, 1)
        assert made.files is not None
        assert made.files.bytes_fetched == sum(path.stat().st_size for path in (folder / "shards").glob("*.bin"))
        yield loader
        made.files.close()


def drain(loader: Batches, count: int) -> None:
    for _ in range(count):
        next(loader)


def turn(name: str, loader: Batches) -> tuple[float, float]:
    """Wall and processor time of a micro-batch."""
    count = BATCHES_OF_TURN.get(name, MANY)
    wall, cpu = seconds(lambda: drain(loader, count))
    return wall / count, cpu / count


def measure(names: list[str], rounds: int, folder: Path) -> dict[str, Any]:
    """The figures of the loaders."""
    loaders = {name: LOADERS[name](folder) for name in names}
    for name, loader in loaders.items():
        check(name, loader)
    with from_s3(folder) as remote:
        loaders["s3"] = remote
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
        for _ in range(rounds):
            for name, loader in loaders.items():
                turns[name].append(turn(name, loader))
    tokens = MICRO_BATCH * LENGTH
    ours = turns["megakor"]
    figures: dict[str, Any] = {
        "tokens_per_second": tokens / median(wall for wall, _ in ours),
        "cpu_seconds_per_million_tokens": 1e6 * median(cpu for _, cpu in ours) / tokens,
    }
    for name, theirs in turns.items():
        if name != "megakor":
            ratios = [their[0] / our[0] for our, their in zip(ours, theirs, strict=True)]
            if name == "s3":
                ratios = [1 / ratio for ratio in ratios]
            figures["ratio_s3_warm_vs_local" if name == "s3" else f"ratio_vs_{name}"] = median(ratios)
            figures[f"range_{name}"] = [min(ratios), max(ratios)]
    model = load_experiment("pretrain", "1_3b_polyglot").model
    step = LENGTH * train_flops_per_token(model, LENGTH) / A100_FLOPS
    figures["share_of_a100_step"] = LENGTH * figures["cpu_seconds_per_million_tokens"] / 1e6 / step
    for name in names:
        figures[f"mib_{name}"] = run_ranks(memory, 1, name, folder)[0] / 2**20
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--loader", nargs="+", choices=list(LOADERS), default=list(LOADERS))
    parser.add_argument("--profile", action="store_true", help="where megakor's time goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        start = time.perf_counter()
        write(folder)
        print(f"{NUM_SHARDS * SAMPLES_OF_SHARD:,} samples written in {time.perf_counter() - start:.0f} s", flush=True)
        if arguments.profile:
            loader = megakor(folder)
            turn("megakor", loader)
            with cProfile.Profile() as profile:
                turn("megakor", loader)
            pstats.Stats(profile).sort_stats("tottime").print_stats(12)
        names = list(dict.fromkeys(["megakor", *arguments.loader]))
        print(json.dumps(measure(names, arguments.rounds, folder)))


if __name__ == "__main__":
    main()
