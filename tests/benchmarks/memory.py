"""Peak memory of a rank, measured and predicted, as ZeRO and tensor parallelism grow.

    python -m tests.benchmarks.memory [--precision fp32 …] [--layout "zero 3, dp 2" …]

Measured: the highest resident size of a process over building and two optimizer steps, less its resident size after the
process group was made; of the ranks, the largest. Every layout runs in fresh processes. Memory that the allocator keeps
for later would count as used, so blocks from 64 KiB on are mapped and given back one by one.

Predicted: by the formulas of `megakor.plan.memory`. Only `libraries` is measured: what a run of a model of almost no
size adds, code pages and buffers.

DeepSpeed's ZeRO-3 keeps a billion parameters gathered before it lets one go, more than this model has: it is told to
keep none longer than a layer needs them. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from megakor.config.schema import EngineConfig, ModelConfig, OptimizerConfig, ParallelConfig, Precision, TrainConfig
from megakor.parallel.dims import ParallelDims
from megakor.plan.memory import StageMemory, stage_memory
from megakor.plan.partition import layers_of, partition
from megakor.train.engine import Engine
from megakor.train.values import SeededValues
from tests.benchmarks.trainers import LEARNING_RATE, Case
from tests.plan import machine
from tests.plan.machine import NUM_MICRO_BATCHES, SEQUENCE_LENGTH, SETTINGS
from tests.ranks import run_ranks
from tests.resident import give_back_freed_blocks, peak_resident_size, resident_size

MIB = 2**20
NUM_STEPS = 2
MODEL = replace(machine.MODEL, num_hidden_layers=18)
TINY = replace(MODEL, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=64)


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
    config = configuration(layout, precision)
    case = Case("memory", model, config.train)
    dims = ParallelDims.from_config(config.parallel, dist.get_world_size())
    gc.collect()
    before = resident_size()
    engine = Engine(config, model, case.vocabulary, dims, SeededValues(model, config.train.seed))
    for step in range(NUM_STEPS):
        engine.train_step(case.batches(step)[engine.data_rank :: dims.data], LEARNING_RATE, step)
    return peak_resident_size() - before


def measured(model: ModelConfig, layout: Layout, precision: Precision) -> int:
    """The largest growth of a rank, bytes."""
    return max(run_ranks(train, layout.world_size, model, layout, precision, timeout=600))


def configuration(layout: Layout, precision: Precision) -> EngineConfig:
    return EngineConfig(
        run="",
        parallel=ParallelConfig(tensor_parallel_size=layout.tensor, zero_stage=layout.stage),
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


def predicted(model: ModelConfig, layout: Layout, precision: Precision, libraries: float) -> StageMemory:
    """What `megakor plan` says of such a rank, with what a run of a model of almost no size adds."""
    config = configuration(layout, precision)
    dims = ParallelDims.from_config(config.parallel, layout.world_size)
    (stage,) = partition(layers_of(model), config.parallel.pipeline_partition, dims.pipeline, dims.tensor)
    return stage_memory(config, model, dims, stage, on_host=True, libraries=libraries)


def main() -> None:
    known = {layout.name: layout for layout in LAYOUTS}
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.memory")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--layout", nargs="+", choices=known, default=list(known))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("precision  layout                measured  predicted  difference  (MiB)  fullest moment", flush=True)
    for precision in map(Precision, arguments.precision):
        libraries = measured(TINY, Layout(1, replicas=2), precision)
        for name in arguments.layout:
            found = measured(MODEL, known[name], precision)
            plan = predicted(MODEL, known[name], precision, libraries)
            difference = found / plan.total - 1
            rows.append({
                "precision": precision.value, "layout": name, "measured": found, "predicted": plan.total,
                "difference": round(difference, 4), "parts": plan.parts, "moment": plan.moment,
            })  # fmt: skip
            print(
                f"{precision.value:9}  {name:20} {found / MIB:9.0f} {plan.total / MIB:10.0f} "
                f"{100 * difference:9.1f} %         {plan.moment}",
                flush=True,
            )
    worst = max(abs(row["difference"]) for row in rows)
    print(json.dumps({"worst_difference": worst, "rows": rows}), flush=True)


if __name__ == "__main__":
    main()
