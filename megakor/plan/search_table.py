"""What a search has found, in print: a table for people, JSON for programs."""

from __future__ import annotations

import json

from megakor.config.schema import PlanSearchConfig
from megakor.plan.memory import GIB
from megakor.plan.plan import Subject
from megakor.plan.search import Found, Layout
from megakor.plan.table import new_console, new_table


def row(layout: Layout) -> dict[str, object]:
    """A layout's figures by name."""
    return {
        "layout": layout.overrides,
        "step_seconds": layout.time.seconds,
        "step_seconds_by_part": layout.time.parts,
        "mfu": layout.time.mfu,
        "memory_gib_per_gpu": layout.memory.total / GIB,
        "bound": layout.bound,
    }


def as_json(found: Found) -> str:
    """All layouts that fit, fastest first, and how many others were left out."""
    return json.dumps({"layouts": [row(layout) for layout in found.layouts], "left_out": found.left_out})


def print_table(config: PlanSearchConfig, subject: Subject, found: Found) -> None:
    """The fastest layouts, on standard output."""
    console, hardware = new_console(), subject.hardware
    console.print(
        f"{config.name} on {subject.world_size} × {hardware.name}: {len(found.layouts):,} layouts fit into "
        f"{hardware.memory_gib:g} GiB; global batch {config.train.global_batch_size} × "
        f"{config.train.sequence_length:,} tokens\n"
    )
    numbers = ("tensor", "pipeline", "context", "data", "ZeRO", "micro-batch")
    table = new_table(("",), (*numbers, "GiB", "step s", "MFU"))
    for name in ("recomputed", "besides", "bound by"):
        table.add_column(name, no_wrap=True)
    for number, layout in enumerate(found.layouts[: config.num_rows], start=1):
        dims, parallel, train = layout.dims, layout.parallel, layout.train
        besides = {
            "sequence parallel": parallel.sequence_parallel,
            "optimizer offloaded": parallel.offload_optimizer,
            "parameters offloaded": parallel.offload_parameters,
        }
        sizes = (dims.tensor, dims.pipeline, dims.context, dims.data, parallel.zero_stage, train.micro_batch_size)
        table.add_row(
            str(number), *map(str, sizes), f"{layout.memory.total / GIB:.1f}", f"{layout.time.seconds:.3f}",
            f"{layout.time.mfu:.1%}", train.activation_checkpointing.value,
            ", ".join(name for name, there in besides.items() if there), layout.bound,
        )  # fmt: skip
    console.print(table)
    console.print("\nLeft out:")
    for reason, count in found.left_out.items():
        console.print(f"{count:>7,}  {reason}", soft_wrap=True)
    if found.layouts:
        words = " ".join(f"{key}={value}" for key, value in found.layouts[0].overrides.items())
        console.print(f"\nThe first as overrides:\n{words}", soft_wrap=True)
