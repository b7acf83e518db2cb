"""A batch that the ranks do not divide, that grows, and whose rows grow: one loss curve on any number of ranks."""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from megakor.config.schema import DataConfig, TrainConfig
from megakor.data.stream import pretrain_stream
from megakor.parallel.dims import ParallelDims
from megakor.train.engine import Engine
from megakor.train.values import SeededValues
from tests.data.tokens import write_shards
from tests.distributed.tiny import NUM_TOKENS, SEQUENCE_LENGTH, Curve, Layout, configuration, difference
from tests.ranks import run_ranks

NUM_STEPS = 9
PHASES = {"batch_sizes": {7: 3, 24: 5}, "sequence_lengths": {15: SEQUENCE_LENGTH // 2, 30: SEQUENCE_LENGTH // 4}}
"""Steps of 3, 3, 3, 5, 5, 5 and then 8 sequences, in rows of a half, a half … and a quarter, then whole."""

PLAIN = [
    Layout(2, zero=1, micro_batch=2),
    Layout(2, zero=2, micro_batch=1),
    Layout(2, zero=1, micro_batch=1, variant="optimizer offloaded"),
    Layout(2, zero=3, micro_batch=4),
    Layout(2, tensor=2, sequence_parallel=True, micro_batch=2),
    Layout(2, context=2, micro_batch=3),
    Layout(2, zero=1, micro_batch=1, checkpointing="full", precision="bf16"),
]
OF_THREE = [Layout(3, zero=1, micro_batch=1), Layout(3, zero=3, micro_batch=2)]
STAGES = [Layout(2, pipeline=2, micro_batch=1, num_layers=4), Layout(2, pipeline=2, micro_batch=2, num_layers=4)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    generator = np.random.default_rng(5)
    documents = [(NUM_TOKENS * generator.random(70) ** 3).astype(int).tolist() for _ in range(40)]
    write_shards(folder, [documents[:25], documents[25:]], eod_id=0)
    return folder


class Sizes:
    """Of a tokenizer."""

    vocab_size, eod_id = NUM_TOKENS, 0


def train(folder: Path, layouts: list[Layout]) -> list[Curve]:
    """The curve of each layout on this rank."""
    curves = []
    for layout in layouts:
        config = configuration(layout)
        config.train = replace(config.train, micro_batch_size=layout.micro_batch, **PHASES)
        assert isinstance(config.train, TrainConfig)
        data = DataConfig(train=str(folder), tokenizer="unused", num_streams=4, shuffle_window=16)
        stream = pretrain_stream(data, config.train, Sizes(), Path("no run"))
        dims = ParallelDims.from_config(config.parallel, dist.get_world_size())
        with redirect_stdout(StringIO()):
            engine = Engine(config, config.model, NUM_TOKENS, dims, SeededValues(config.model, 7))
        curve = []
        for step in range(NUM_STEPS):
            batches = stream.micro_batches(step, engine.data_rank, dims.data, layout.micro_batch)
            result = engine.train_step(batches, 1e-3, step)
            curve.append((result.loss, result.grad_norm))
        engine.engine.destroy()
        curves.append(curve)
    return curves


@pytest.fixture(scope="module")
def references(shards: Path) -> dict[Layout, Curve]:
    """One process that takes each batch at once."""
    layouts = sorted({whole(layout) for layout in (*PLAIN, *OF_THREE, *STAGES)}, key=str)
    (curves,) = run_ranks(train, 1, shards, layouts)
    return dict(zip(layouts, curves, strict=True))


def whole(layout: Layout) -> Layout:
    fp32 = layout.precision == "fp32"
    return Layout(zero=0 if fp32 else 1, precision=layout.precision, num_layers=layout.num_layers)


@pytest.mark.parametrize("layouts", [PLAIN, OF_THREE, STAGES], ids=["two ranks", "three ranks", "two stages"])
def test_one_curve(shards: Path, references: dict[Layout, Curve], layouts: list[Layout]) -> None:
    ranks = run_ranks(train, layouts[0].ranks, shards, layouts, timeout=300)
    for index, layout in enumerate(layouts):
        found = difference([curves[index] for curves in ranks], references[whole(layout)])
        assert all(value <= limit for value, limit in zip(found, layout.tolerance, strict=True)), (str(layout), found)
