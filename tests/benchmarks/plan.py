"""What the plan says against what happens on this machine: time of a step and memory of a rank, of real DeepSpeed runs.

    python -m tests.benchmarks.plan [--precision bf16] [--layout dp2_zero1 …] [--save]

Every layout runs in fresh processes, one thread and one core a rank. Memory is as in `tests.benchmarks.memory`, over
two steps. Then the allocator is set back to what glibc does by itself, and further steps are timed. Between them probes
measure what the plan needs to know of the hardware, with as many ranks (`tests.benchmarks.probes`). The last line is
one JSON object; `--save` writes it where docs/validation.md is made from.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import time
from dataclasses import asdict
from statistics import median
from typing import Any

import torch.distributed as dist

from megakor.config.schema import Precision
from megakor.plan.hardware import Hardware
from megakor.train.engine import Engine
from megakor.train.values import SeededValues
from tests.benchmarks.memory import MIB, TINY, measured
from tests.benchmarks.memory import Layout as MemoryLayout
from tests.benchmarks.probes import Probes
from tests.benchmarks.train_step import rounded
from tests.benchmarks.trainers import Case
from tests.plan.machine import LAYOUTS, MEASURED, MODEL, SEQUENCE_LENGTH, Layout, row
from tests.ranks import run_ranks
from tests.resident import give_back_freed_blocks, keep_freed_blocks, peak_resident_size, resident_size

TIMED_STEPS = 2


def run(layout: Layout, precision: Precision) -> tuple[int, float, float, Hardware]:
    """Train on this rank.

    Returns:
        What its resident size grew by at most, bytes; median seconds of a step, and of those that its core worked; the
        hardware.
    """
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # DeepSpeed prints
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[dist.get_rank() % len(cores)]})
    give_back_freed_blocks()
    config = layout.config(precision)
    case = Case("plan", MODEL, config.train)
    gc.collect()
    before = resident_size()
    engine = Engine(config, MODEL, case.vocabulary, layout.dims, SeededValues(MODEL, config.train.seed))
    for number in range(2):
        timed_step(engine, case, number)
    grown = peak_resident_size() - before
    keep_freed_blocks()
    timed_step(engine, case, 2)
    probes, taken = Probes(MODEL, SEQUENCE_LENGTH, precision), []
    for number in range(TIMED_STEPS):
        probes.turn()
        taken.append(timed_step(engine, case, 3 + number))
    return grown, median(wall for wall, _ in taken), median(own for _, own in taken), probes.hardware()


def timed_step(engine: Engine, case: Case, number: int) -> tuple[float, float]:
    """Seconds of a step, from a moment that all ranks share, and those that the rank's core worked."""
    batches = case.batches(number)[engine.data_rank :: engine.dims.data]
    dist.barrier()
    start, worked = time.perf_counter(), time.process_time()
    engine.train_step(batches, 1e-3, number)
    return time.perf_counter() - start, time.process_time() - worked


def measure(layout: Layout, precision: Precision, libraries: int) -> dict[str, Any]:
    """The figures of a layout's ranks: the largest of each, and the hardware.

    Args:
        libraries: bytes that the run of a model of almost no size takes.
    """
    results = run_ranks(run, layout.ranks, layout, precision, timeout=500)
    grown, taken, worked, hardware = zip(*results, strict=True)
    return {
        "seconds": max(taken),
        "num_bytes": max(grown),
        "core_seconds": max(worked),
        "libraries": libraries,
        "hardware": asdict(hardware[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.plan")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--save", action="store_true", help=f"write the figures to {MEASURED.name}")
    arguments = parser.parse_args()
    precision = Precision(arguments.precision)
    libraries = measured(TINY, MemoryLayout(1, replicas=2), precision)
    figures: dict[str, Any] = {"precision": precision.value, "layouts": {}}
    for name in arguments.layout:
        figures["layouts"][name] = rounded(measure(LAYOUTS[name], precision, libraries))
        found = row(name, figures["layouts"][name], precision)
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in found.time.parts.items() if seconds)
        print(
            f"{name:12} {found.seconds:.2f} s ({found.core_seconds:.2f} of a core), planned {found.time.seconds:.2f} s "
            f"({found.time_difference:+.0f} %: {parts}); {found.num_bytes / MIB:.0f} MiB, planned "
            f"{found.planned_bytes / MIB:.0f} MiB ({found.memory_difference:+.0f} %)",
            flush=True,
        )
        if arguments.save:
            MEASURED.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
