"""What the plan says against what happens on this machine: time of a step and memory of a rank, of real DeepSpeed runs.

    python -m tests.benchmarks.plan [--precision bf16] [--layout dp2_zero1 …] [--save]

Every layout runs in fresh processes, one thread and one core a rank. Memory is as in `tests.benchmarks.memory`, over
two steps. Then the allocator is set back to what glibc does by itself, and steps are timed; and then to keep all memory
that is freed, as PyTorch's allocator of accelerators does, which is what the plan is held against. Between those steps
probes measure what the plan needs to know of the hardware, with as many ranks (`tests.benchmarks.probes`). The last
line is one JSON object; `--save` writes it where docs/validation.md is made from.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import os
import sys
import time
from dataclasses import asdict, dataclass
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

TIMED_STEPS = 3
ALL = 2**30
"""Bytes that no block here has."""


@dataclass(frozen=True)
class RankFigures:
    """What a rank measured.

    Attributes:
        num_bytes: growth of its resident size at most.
        seconds: median of a step, where freed memory is kept.
        core_seconds: of them, those that its core worked.
        returned_seconds: median of a step, where freed memory goes back as glibc does it.
    """

    num_bytes: int
    seconds: float
    core_seconds: float
    returned_seconds: float
    hardware: Hardware


def run(layout: Layout, precision: Precision) -> RankFigures:
    """Train on this rank."""
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
    steps = itertools.count()

    def step() -> tuple[float, float]:
        return timed_step(engine, case, next(steps))

    step(), step()
    grown = peak_resident_size() - before
    keep_freed_blocks()
    step()
    returned = median(step()[0] for _ in range(TIMED_STEPS))
    keep_freed_blocks(ALL)
    step()
    probes, taken = Probes(MODEL, SEQUENCE_LENGTH, precision), []
    for _ in range(TIMED_STEPS):
        probes.turn()
        taken.append(step())
    wall, own = (median(times) for times in zip(*taken, strict=True))
    return RankFigures(grown, wall, own, returned, probes.hardware())


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
    ranks = run_ranks(run, layout.ranks, layout, precision, timeout=500)
    names = ("seconds", "num_bytes", "core_seconds", "returned_seconds")
    largest = {name: max(getattr(figures, name) for figures in ranks) for name in names}
    return {**largest, "libraries": libraries, "hardware": asdict(ranks[0].hardware)}


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
            f"{name:12} {found.seconds:.2f} s ({found.core_seconds:.2f} of a core; giving memory back "
            f"{found.returned_seconds:.2f} s), planned {found.time.seconds:.2f} s ({found.time_difference:+.0f} %: "
            f"{parts}); {found.num_bytes / MIB:.0f} MiB, planned {found.planned_bytes / MIB:.0f} MiB "
            f"({found.memory_difference:+.0f} %)",
            flush=True,
        )
        if arguments.save:
            MEASURED.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
