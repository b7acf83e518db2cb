"""Peak memory of a rank, measured and predicted, as ZeRO and tensor parallelism grow.

    python -m tests.benchmarks.memory [--precision fp32 …] [--layout "zero 3, dp 2" …]

Measured: the highest resident size of a process over building and two optimizer steps, less its resident size after the
process group was made; of the ranks, the largest. Every layout runs in fresh processes. Memory that the allocator keeps
for later would count as used, so blocks from 64 KiB on are mapped and given back one by one.

Predicted: what stays (`kept`) and the highest of what comes and goes (`passing`), by the terms below; all in bytes, for
n parameters of a rank's model, b bytes each, `own` = n / replicas. Only `libraries` is measured: what a run of a model
of almost no size adds, code pages and buffers.

DeepSpeed's ZeRO-3 keeps a billion parameters gathered before it lets one go, more than this model has: it is told to
keep none longer than a layer needs them. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from megakor.config.schema import EngineConfig, ModelConfig, OptimizerConfig, ParallelConfig, Precision, TrainConfig
from megakor.model.specs import parameter_specs
from megakor.parallel.dims import ParallelDims
from megakor.train.device import DTYPES
from megakor.train.engine import Engine
from megakor.train.values import SeededValues
from tests.benchmarks.trainers import LEARNING_RATE, Case
from tests.ranks import run_ranks
from tests.resident import give_back_freed_blocks, peak_resident_size, resident_size

MIB = 2**20
NUM_STEPS = 2
NUM_MICRO_BATCHES = 2  # of a replica: the second finds the gradients of the first
MODEL = ModelConfig(
    hidden_size=1024,
    num_hidden_layers=18,
    num_attention_heads=16,
    intermediate_size=4096,
    vocab_size=16384,
    rotary_pct=0.5,
)
TINY = replace(MODEL, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=64)
SEQUENCE_LENGTH = 256
SETTINGS = {
    "zero_optimization": {
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
    }
}


@dataclass(frozen=True)
class Layout:
    """A ZeRO stage and sizes; the product of the sizes is the number of processes."""

    stage: int
    tensor: int = 1
    replicas: int = 1

    @property
    def name(self) -> str:
        return f"zero {self.stage}" + "".join(
            f", {axis} {size}" for axis, size in (("tp", self.tensor), ("dp", self.replicas)) if size > 1
        )

    @property
    def world_size(self) -> int:
        return self.tensor * self.replicas


LAYOUTS = [
    Layout(1),
    *(Layout(stage, replicas=2) for stage in (1, 2, 3)),
    Layout(1, tensor=2),
    *(Layout(stage, replicas=4) for stage in (1, 2, 3)),
    *(Layout(stage, tensor=2, replicas=2) for stage in (1, 2, 3)),
    Layout(1, tensor=4),
]


def train(model: ModelConfig, layout: Layout, precision: Precision) -> int:
    """Build and train on this rank; returns what the resident size grew by at most, bytes."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # DeepSpeed prints
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    give_back_freed_blocks()
    parallel = ParallelConfig(tensor_parallel_size=layout.tensor, zero_stage=layout.stage)
    config = EngineConfig(
        run="",
        parallel=parallel,
        train=TrainConfig(
            num_steps=NUM_STEPS,
            global_batch_size=NUM_MICRO_BATCHES * layout.replicas,
            micro_batch_size=1,
            sequence_length=SEQUENCE_LENGTH,
            precision=precision,
        ),
        optimizer=OptimizerConfig(lr=LEARNING_RATE),
        deepspeed=SETTINGS,
    )
    case = Case("memory", model, config.train)
    dims = ParallelDims.from_config(parallel, dist.get_world_size())
    gc.collect()
    before = resident_size()
    engine = Engine(config, model, case.vocabulary, dims, SeededValues(model, config.train.seed))
    for step in range(NUM_STEPS):
        engine.train_step(case.batches(step)[engine.data_rank :: dims.data], LEARNING_RATE, step)
    return peak_resident_size() - before


def measured(model: ModelConfig, layout: Layout, precision: Precision) -> int:
    """The largest growth of a rank, bytes."""
    return max(run_ranks(train, layout.world_size, model, layout, precision, timeout=600))


def activations(model: ModelConfig, layout: Layout, precision: Precision) -> int:
    """What a micro-batch of one sequence keeps for its backward pass, bytes.

    In units of [seq, hidden]: a block's input and its two norms' outputs, whole on every tensor rank; split over them,
    queries, keys and values as projected (3), queries and keys as rotated (2), the attention's output (1), the
    feed-forward's hidden states before and after GELU (2 × intermediate / hidden). Then the final norm's input and
    output.
    """
    split = 3 + 2 + 1 + 2 * model.intermediate_size / model.hidden_size
    units = model.num_hidden_layers * (3 + split / layout.tensor) + 2
    return round(units * SEQUENCE_LENGTH * model.hidden_size * DTYPES[precision].itemsize)


def predicted(model: ModelConfig, layout: Layout, precision: Precision) -> tuple[dict[str, int], dict[str, int]]:
    """What stays from step to step, and what is there besides at each of the fullest moments, bytes.

    Kept: the weights (cut by ZeRO-3); fp32 masters, also of fp32 weights, and Adam's two moments, cut by every stage;
    and gradients: ZeRO-1 in bf16 has them whole, in fp32; ZeRO-3 has its part, in fp32; others have none between steps.

    Moments:
        building: the largest parameter is made whole, fp32, and this rank's shard of it copied.
        head: the backward pass of the second micro-batch begins: all activations, the logits and their gradient, the
            head's gradient (in bf16 ZeRO-1, its fp32 copy too; in ZeRO-3, the gathered head), the first micro-batch's
            gradients.
        part: in ZeRO-2, the last rank has the gradients of its part, the last layers: the first micro-batch's, fp32,
            and the second's, not yet added; the activations of the other layers are still there.
        embedding: it ends, with the embedding's gradient (of the head's size). ZeRO-2's first rank has the gradients
            of its part of both micro-batches, and in bf16 the fp32 copy of the embedding's.
        update: fp32 gradients of this rank's part are copied into one tensor for Adam; those of bf16 ZeRO-1 and ZeRO-2
            lie in one already.
        gathering: ZeRO-1 and 2 gather the updated weights at once, and gloo does so into a copy.
    """
    wide = DTYPES[precision].itemsize == 4
    b = DTYPES[precision].itemsize
    sizes = [math.prod(spec.shape) for spec in parameter_specs(model)]
    cut = [layout.tensor if spec.shard_dim is not None else 1 for spec in parameter_specs(model)]
    n = sum(size // count for size, count in zip(sizes, cut, strict=True))
    own, stage, largest = n // layout.replicas, layout.stage, max(sizes)
    shard = largest // layout.tensor
    assert model.vocab_size is not None
    logits = b * SEQUENCE_LENGTH * model.vocab_size // layout.tensor
    kept = {
        "weights": b * (own if stage == 3 else n),
        "masters": 4 * own,
        "moments": 8 * own,
        "gradients": {1: 0 if wide else 4 * n, 2: 0, 3: 4 * own}[stage],
    }
    begun = activations(model, layout, precision) + 2 * logits + b * shard
    passing: dict[str, float] = {"building": 4 * largest + 4 * shard}
    if stage == 1:
        passing["head"] = begun + (4 * n if wide else 4 * shard)
    elif stage == 2:
        passing["head"] = begun + 4 * own
        passing["part"] = activations(model, layout, precision) * (1 - 1 / layout.replicas) + 4 * own + b * own
        passing["embedding"] = 4 * own + b * own + (0 if wide else (b + 4) * shard)
    else:
        passing["head"] = begun + b * shard
    if wide and stage < 3:
        passing["update"] = 8 * own
    elif stage > 1:
        passing["update"] = 4 * own
    if stage < 3 and layout.replicas > 1:
        passing["gathering"] = b * n
    return kept, {moment: round(num_bytes) for moment, num_bytes in passing.items()}


def main() -> None:
    known = {layout.name: layout for layout in LAYOUTS}
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--layout", nargs="+", choices=known, default=list(known))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("precision  layout                measured  predicted  difference     kept   passing  (MiB)", flush=True)
    for precision in map(Precision, arguments.precision):
        libraries = measured(TINY, Layout(1, replicas=2), precision)
        for name in arguments.layout:
            found = measured(MODEL, known[name], precision)
            kept, passing = predicted(MODEL, known[name], precision)
            kept["libraries"] = libraries
            moment = max(passing, key=lambda moment: passing[moment])
            stays = sum(kept.values())
            difference = found / (stays + passing[moment]) - 1
            rows.append({
                "precision": precision.value, "layout": name, "measured": found, "predicted": stays + passing[moment],
                "difference": round(difference, 4), "kept": kept, "passing": passing[moment], "moment": moment,
            })  # fmt: skip
            print(
                f"{precision.value:9}  {name:20} {found / MIB:9.0f} {(stays + passing[moment]) / MIB:10.0f} "
                f"{100 * difference:9.1f} % {stays / MIB:8.0f} {passing[moment] / MIB:9.0f}  {moment}",
                flush=True,
            )
    worst = max(abs(row["difference"]) for row in rows)
    print(json.dumps({"worst_difference": worst, "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
