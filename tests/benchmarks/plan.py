"""What the plan says against what happens on this machine: time of a step and memory of a rank, of real DeepSpeed runs.

    python -m tests.benchmarks.plan [--precision bf16] [--layout dp2_zero1 …]

Every layout runs in fresh processes, one thread and one core a rank. Memory is as in `tests.benchmarks.memory`, over
two steps. Then the allocator is set back to what glibc does by itself, and further steps are timed. Between them probes
measure what the plan needs to know of the hardware, with as many ranks (`tests.benchmarks.probes`). The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch.distributed as dist

from megakor.config.schema import (
    ActivationCheckpointing,
    EngineConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    TrainConfig,
)
from megakor.parallel.dims import ParallelDims
from megakor.plan.hardware import Hardware
from megakor.plan.time import step_time
from megakor.train.engine import Engine
from megakor.train.values import SeededValues
from tests.benchmarks.memory import MIB, MODEL, NUM_MICRO_BATCHES, SEQUENCE_LENGTH, SETTINGS
from tests.benchmarks.probes import Probes
from tests.benchmarks.train_step import rounded
from tests.benchmarks.trainers import LEARNING_RATE, Case
from tests.ranks import run_ranks
from tests.resident import give_back_freed_blocks, keep_freed_blocks, peak_resident_size, resident_size

TIMED_STEPS = 4
FULL = ActivationCheckpointing.full


@dataclass(frozen=True)
class Layout:
    """A layout on one or two ranks."""

    parallel: ParallelConfig
    ranks: int = 2
    checkpointing: ActivationCheckpointing = ActivationCheckpointing.none


STAGES = ParallelConfig(pipeline_parallel_size=2, pipeline_partition="uniform")
LAYOUTS = {
    "one": Layout(ParallelConfig(), ranks=1),
    "one_offload": Layout(ParallelConfig(offload_optimizer=True), ranks=1),
    "dp2_zero1": Layout(ParallelConfig(zero_stage=1)),
    "dp2_zero2": Layout(ParallelConfig(zero_stage=2)),
    "dp2_zero3": Layout(ParallelConfig(zero_stage=3)),
    "tp2": Layout(ParallelConfig(tensor_parallel_size=2)),
    "tp2_sp": Layout(ParallelConfig(tensor_parallel_size=2, sequence_parallel=True)),
    "pp2": Layout(STAGES),
    "pp2_full": Layout(STAGES, checkpointing=FULL),
}


def engine_config(layout: Layout, precision: Precision) -> EngineConfig:
    replicas = ParallelDims.from_config(layout.parallel, layout.ranks).data
    return EngineConfig(
        run="",
        parallel=layout.parallel,
        train=TrainConfig(
            num_steps=1,
            global_batch_size=NUM_MICRO_BATCHES * replicas,
            micro_batch_size=1,
            sequence_length=SEQUENCE_LENGTH,
            precision=precision,
            activation_checkpointing=layout.checkpointing,
        ),
        optimizer=OptimizerConfig(lr=LEARNING_RATE),
        deepspeed=SETTINGS,
    )


def run(layout: Layout, precision: Precision) -> tuple[int, float, Hardware]:
    """Train on this rank: what its resident size grew by at most, bytes; median seconds of a step; the hardware."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # DeepSpeed prints
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[dist.get_rank() % len(cores)]})
    give_back_freed_blocks()
    config = engine_config(layout, precision)
    case = Case("plan", MODEL, config.train)
    dims = ParallelDims.from_config(config.parallel, layout.ranks)
    gc.collect()
    before = resident_size()
    engine = Engine(config, MODEL, case.vocabulary, dims, SeededValues(MODEL, config.train.seed))
    for number in range(2):
        timed_step(engine, case, number)
    grown = peak_resident_size() - before
    keep_freed_blocks()
    timed_step(engine, case, 2)
    probes, taken = Probes(MODEL, SEQUENCE_LENGTH, precision), []
    for number in range(TIMED_STEPS):
        probes.turn()
        taken.append(timed_step(engine, case, 3 + number))
    return grown, median(taken), probes.hardware()


def timed_step(engine: Engine, case: Case, number: int) -> float:
    """Seconds of a step, from a moment that all ranks share."""
    batches = case.batches(number)[engine.data_rank :: engine.dims.data]
    dist.barrier()
    start = time.perf_counter()
    engine.train_step(batches, LEARNING_RATE, number)
    return time.perf_counter() - start


def compare(layout: Layout, precision: Precision) -> dict[str, Any]:
    """Measured and predicted figures of a layout."""
    results = run_ranks(run, layout.ranks, layout, precision, timeout=500)
    config, hardware = engine_config(layout, precision), results[0][2]
    dims = ParallelDims.from_config(config.parallel, layout.ranks)
    planned = step_time(MODEL, config.parallel, config.train, dims, hardware)
    seconds = max(taken for _, taken, _ in results)
    return {
        "measured_seconds": seconds, "predicted_seconds": planned.seconds,
        "time_difference": planned.seconds / seconds - 1, "parts": planned.parts,
        "measured_bytes": max(grown for grown, _, _ in results),
        "matmul_gflops": hardware.peak(precision) / 1e9, "memory_gb_per_s": hardware.memory_gb_per_s,
        "link_gb_per_s": hardware.node_gb_per_s, "link_latency_us": hardware.node_latency_us,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.plan")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    arguments = parser.parse_args()
    precision = Precision(arguments.precision)
    rows = {}
    for name in arguments.layout:
        rows[name] = row = compare(LAYOUTS[name], precision)
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in row["parts"].items() if seconds)
        print(
            f"{name:12} {row['measured_seconds']:7.2f} s, predicted {row['predicted_seconds']:7.2f} s "
            f"({100 * row['time_difference']:+.0f} %: {parts}); {row['measured_bytes'] / MIB:6.0f} MiB; "
            f"{row['matmul_gflops']:.0f} GFLOP/s, {row['memory_gb_per_s']:.1f} GB/s, {row['link_gb_per_s']:.2f} GB/s",
            flush=True,
        )
    print(json.dumps(rounded({"precision": arguments.precision, "layouts": rows})), flush=True)


if __name__ == "__main__":
    main()
