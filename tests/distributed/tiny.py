"""A tiny training run in any layout, on gloo ranks, without files: what a layout does to losses and gradient norms.

Layout ─► configuration, refused or legal ─► `Engine` on forked ranks ─► curve of every rank ─► difference
"""

from __future__ import annotations

import gc
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import astuple, dataclass, fields
from io import StringIO
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megakor.config.checks import check
from megakor.config.schema import (
    ActivationCheckpointing,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    OptimizerName,
    ParallelConfig,
    Precision,
    PretrainConfig,
    ScheduleConfig,
    TrainConfig,
)
from megakor.data.stream import Batch
from megakor.parallel.dims import ParallelDims
from megakor.train.engine import Engine
from megakor.train.schedule import learning_rate
from megakor.train.values import SeededValues
from tests.ranks import run_ranks

NUM_STEPS = 20
GLOBAL_BATCH_SIZE = 8
SEQUENCE_LENGTH = 32
NUM_TOKENS, NUM_ROWS = 90, 128
"""The true vocabulary, and the embedding's rows: the last of four tensor ranks has no column that counts."""

FP32_TOLERANCE = (1e-5, 1e-5)
"""The largest relative difference of a loss and of a gradient norm from the reference."""

ROUNDING = (2.0**-11, 2.0**-8)
"""The same for one process in bf16 against one in fp32. The difference is rounding alone, to 8 significant bits; it was
measured as 2.3e-4 and 2.9e-3.

Two layouts in bf16 round other partial sums, and each may lie so far off, to either side: they may differ by twice it.
"""

VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "tied embeddings": {"model.tie_word_embeddings": True},
    "sequential residual": {"model.use_parallel_residual": False},
    # Where heads do not rotate, the gradient of a key's bias is rounding alone; Adafactor divides it by its own size.
    "adafactor": {"optimizer.name": OptimizerName.adafactor, "model.rotary_pct": 1.0},
    "optimizer offloaded": {"parallel.offload_optimizer": True},
    "parameters offloaded": {"parallel.offload_parameters": True},
    "both offloaded": {"parallel.offload_optimizer": True, "parallel.offload_parameters": True},
    "uniform stages": {"parallel.pipeline_partition": "uniform"},
    "stages by type": {"parallel.pipeline_partition": "type:Block"},
    "other seed": {"train.seed": 8},
    "dropout": {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1},
}
"""Keys that differ from the tiny run's."""

Curve = list[tuple[float, float]]
"""(loss, gradient norm) of each step."""


@dataclass(frozen=True)
class Layout:
    """One run of the tiny model; the data-parallel size is what the other sizes leave.

    Attributes:
        num_layers: with four stages there must be four; without stages two say as much in less time.
        variant: one of `VARIANTS`.
        documents: whether rows hold several documents.
    """

    ranks: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    zero: int = 1
    sequence_parallel: bool = False
    checkpointing: str = "none"
    micro_batch: int = 8
    precision: str = "fp32"
    variant: str = ""
    num_layers: int = 2
    documents: bool = False

    @property
    def data(self) -> int:
        return self.ranks // (self.tensor * self.pipeline * self.context)

    @property
    def num_micro_batches(self) -> int:
        return GLOBAL_BATCH_SIZE // (self.micro_batch * self.data)

    @property
    def sizes(self) -> tuple[int, ...]:
        """What a row of the table is about."""
        return (*astuple(self)[1:4], self.data, self.zero, int(self.sequence_parallel))

    @property
    def reference(self) -> Layout:
        """The run that this one must equal: one process, the whole batch at once, without ZeRO.

        In bf16, where ZeRO-0 is refused, ZeRO-1; whose own reference is in fp32.
        """
        precision = self.precision if self.ranks > 1 else "fp32"
        trains_otherwise = any(not key.startswith("parallel.") for key in VARIANTS[self.variant])
        return Layout(
            zero=0 if precision == "fp32" else 1,
            precision=precision,
            variant=self.variant if trains_otherwise else "",
            num_layers=self.num_layers,
            documents=self.documents,
        )

    @property
    def tolerance(self) -> tuple[float, float]:
        """The largest relative difference of a loss and of a gradient norm from the reference."""
        loss, norm = FP32_TOLERANCE if self.precision == "fp32" else ROUNDING
        rounded = 2 if self.precision == "bf16" and self.ranks > 1 else 1
        return rounded * loss, rounded * norm

    def __str__(self) -> str:
        plain = Layout(ranks=self.ranks)
        told = [f"{field.name}={getattr(self, field.name)}" for field in fields(self)
                if getattr(self, field.name) != getattr(plain, field.name)]  # fmt: skip
        return " ".join([f"{self.ranks} ranks", *told])


def configuration(layout: Layout) -> PretrainConfig:
    """The tiny run. DeepSpeed's buckets are small, so that there are several of them, as in a large model."""
    config = PretrainConfig(
        run="unused",
        parallel=ParallelConfig(
            tensor_parallel_size=layout.tensor,
            pipeline_parallel_size=layout.pipeline,
            context_parallel_size=layout.context,
            sequence_parallel=layout.sequence_parallel,
            zero_stage=layout.zero,
        ),
        train=TrainConfig(
            seed=7,
            num_steps=NUM_STEPS,
            global_batch_size=GLOBAL_BATCH_SIZE,
            micro_batch_size=layout.micro_batch,
            sequence_length=SEQUENCE_LENGTH,
            precision=Precision(layout.precision),
            activation_checkpointing=ActivationCheckpointing(layout.checkpointing),
        ),
        optimizer=OptimizerConfig(lr=3e-3),
        schedule=ScheduleConfig(warmup_ratio=0.2),
        model=ModelConfig(
            hidden_size=32,
            num_hidden_layers=layout.num_layers,
            num_attention_heads=8,
            intermediate_size=64,
            vocab_size=NUM_ROWS,
            rotary_pct=0.5,
            initializer_range=0.1,  # about (2 / (5 × hidden))^0.5, as a wide model has with 0.02: attention has a say
            max_position_embeddings=SEQUENCE_LENGTH,
        ),
        data=DataConfig(train="unused", tokenizer="unused"),
        deepspeed={
            "zero_optimization": {
                "reduce_bucket_size": 8192,
                "allgather_bucket_size": 8192,
                "stage3_prefetch_bucket_size": 8192,
                "stage3_param_persistence_threshold": 100,  # matrices are cut and gathered, norms and biases stay
            }
        },
    )
    for name, value in VARIANTS[layout.variant].items():
        section, _, key = name.partition(".")
        setattr(getattr(config, section), key, value)
    return config


def checked(layout: Layout) -> tuple[PretrainConfig, ParallelDims]:
    """The run and its dimensions; ValueError where the package refuses the layout."""
    config = configuration(layout)
    check(config)
    dims = ParallelDims.from_config(config.parallel, layout.ranks)
    if GLOBAL_BATCH_SIZE % (layout.micro_batch * dims.data):
        raise ValueError("batches that are filled up are tried elsewhere")
    return config, dims


def is_legal(layout: Layout) -> bool:
    try:
        checked(layout)
    except ValueError:
        return False
    return True


def micro_batches(step: int, dims: ParallelDims, rank: int, size: int, with_documents: bool) -> list[Batch]:
    """A rank's part of a global batch that depends on the step alone.

    Low tokens are frequent, so that there is something to learn. Sequences differ in their share of unmasked labels,
    and one has none: a mean of means would show. Documents begin at other places in every row.
    """
    generator = np.random.default_rng((7, step))
    drawn = generator.random((GLOBAL_BATCH_SIZE, SEQUENCE_LENGTH + 1))
    tokens = (NUM_TOKENS * drawn * drawn * drawn).astype(np.int64)
    shares = generator.random((GLOBAL_BATCH_SIZE, 1))
    mask = (generator.random((GLOBAL_BATCH_SIZE, SEQUENCE_LENGTH)) < shares).astype(np.float32)
    mask[generator.integers(GLOBAL_BATCH_SIZE)] = 0.0
    begins = np.random.default_rng((8, step)).random((GLOBAL_BATCH_SIZE, SEQUENCE_LENGTH)) < 0.2
    documents = begins.cumsum(axis=1, dtype=np.int32)
    part = GLOBAL_BATCH_SIZE // dims.data
    start = dims.data_rank(rank) * part
    rows = [slice(first, first + size) for first in range(start, start + part, size)]
    return [
        Batch(tokens[row, :-1], tokens[row, 1:], mask[row], int(mask.sum()), documents[row] if with_documents else None)
        for row in rows
    ]


def train_one(layout: Layout, num_steps: int) -> Curve:
    """Train on the ranks of the group that is there; every rank calls."""
    config, dims = checked(layout)
    with redirect_stdout(StringIO()):  # DeepSpeed prints the stages
        engine = Engine(config, config.model, NUM_TOKENS, dims, SeededValues(config.model, config.train.seed))
    curve = []
    for step in range(num_steps):
        batches = micro_batches(step, dims, dist.get_rank(), layout.micro_batch, layout.documents)
        lr = learning_rate(config.schedule, config.optimizer.lr, step, NUM_STEPS)
        result = engine.train_step(batches, lr, step)
        curve.append((result.loss, result.grad_norm))
    engine.engine.destroy()  # its hooks
    return curve


def train(layouts: list[Layout], num_steps: int) -> list[Curve]:
    """The curves of layouts of this number of ranks, one after the other."""
    gc.freeze()  # ZeRO-3 collects garbage at every start: spare it what the fork server has loaded
    return [train_one(layout, num_steps) for layout in layouts]


def groups(layouts: Iterable[Layout], size: int) -> Iterator[list[Layout]]:
    """Layouts that can share a group of processes, at most `size`; after a pipeline DeepSpeed's plain engine fails."""
    kinds = defaultdict(list)
    for layout in layouts:
        kinds[layout.ranks, layout.pipeline > 1].append(layout)
    for kind in kinds.values():
        yield from (kind[first : first + size] for first in range(0, len(kind), size))


def curves(
    layouts: Iterable[Layout],
    num_steps: int = NUM_STEPS,
    group_size: int = 8,
    tell: Callable[[dict[Layout, list[Curve]]], None] = lambda found: None,
) -> dict[Layout, list[Curve]]:
    """The curve of each layout on each of its ranks; none for one that cannot be trained.

    Args:
        group_size: layouts trained in the same processes; each leaves its process groups behind.
        tell: called after each group with its curves.
    """
    curves_of: dict[Layout, list[Curve]] = {}
    for group in groups(layouts, group_size):
        try:
            ranks = run_ranks(train, group[0].ranks, group, num_steps, timeout=900)
            found = {layout: [rank[index] for rank in ranks] for index, layout in enumerate(group)}
        except pytest.fail.Exception as failure:
            if len(group) == 1:
                print(f"{group[0]}: {failure}", file=sys.stderr)
                found = {group[0]: []}
            else:  # find the one that fails
                found = curves(group, num_steps, group_size=1)
        curves_of |= found
        tell(found)
    return curves_of


def difference(ranks: list[Curve], reference: Curve) -> tuple[float, float]:
    """The largest relative difference of any rank and step from the reference, of losses and of gradient norms.

    Infinite where there is no curve, or one that is not a number.
    """
    rows = [(row, expected) for curve in ranks for row, expected in zip(curve, reference, strict=True)]
    found = [[abs(row[c] - expected[c]) / abs(expected[c]) for row, expected in rows] for c in (0, 1)]
    loss, norm = (max(column) if column and not any(map(math.isnan, column)) else math.inf for column in found)
    return loss, norm


def holds(layout: Layout, found: tuple[float, float]) -> bool:
    """Whether differences are within the layout's tolerance."""
    return all(value <= limit for value, limit in zip(found, layout.tolerance, strict=True))
