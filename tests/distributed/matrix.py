"""Every layout, one loss curve: the tiny run in each legal combination of sizes, against one process.

    python -m tests.distributed.matrix

The package's own rules say which combinations are legal. Progress goes to stderr. Where every layout is within its
tolerance, the tables in docs/layouts.md are written; otherwise the exit status is 1. What is done is kept in
runs/matrix.jsonl: the same command goes on after an end in the middle, as long as the code is the same.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch

from tests.distributed.tiny import (
    GLOBAL_BATCH_SIZE,
    NUM_STEPS,
    VARIANTS,
    Curve,
    Layout,
    curves,
    difference,
    holds,
    is_legal,
)

PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"

AXES: dict[str, tuple[Any, ...]] = {
    "ranks": (2, 4, 8),
    "tensor": (1, 2, 4),
    "pipeline": (1, 2, 4),
    "context": (1, 2),
    "zero": (1, 2, 3),
    "sequence_parallel": (False, True),
    "checkpointing": ("none", "full", "selective"),
    "micro_batch": (1, 2, 4, 8),
}

COMPARED = tuple(VARIANTS)[1:9]
"""Variants that are compared at 2 and 4 ranks, apart from the product."""

ROUNDED = [Layout(precision="bf16"), Layout(precision="bf16", num_layers=4)]
"""The runs that say how far bf16 is from fp32."""

KEPT = PAGE.parents[1] / "runs" / "matrix.jsonl"

Differences = dict[Layout, tuple[float, float]]
"""The largest relative difference from the reference, of losses and of gradient norms."""


def every() -> list[Layout]:
    """Every legal combination of `AXES`, with one and with two micro-batches a step; two and four with stages."""
    found = []
    for values in itertools.product(*AXES.values()):
        layout = Layout(**dict(zip(AXES, values, strict=True)))
        if layout.pipeline > 1:
            layout = replace(layout, num_layers=4)
        if is_legal(layout) and layout.num_micro_batches in ((2, 4) if layout.pipeline > 1 else (1, 2)):
            found.append(layout)
    return found


def first_of_each_row(layouts: Iterable[Layout]) -> list[Layout]:
    rows: dict[Any, Layout] = {}
    for layout in layouts:
        rows.setdefault((layout.ranks, layout.sizes), layout)
    return list(rows.values())


def in_bf16(layouts: Iterable[Layout]) -> list[Layout]:
    """One bf16 run for each combination of sizes."""
    return [replace(layout, precision="bf16") for layout in first_of_each_row(layouts)]


def with_variants(layouts: Iterable[Layout]) -> list[Layout]:
    """One run of each variant for each combination of sizes at 2 and 4 ranks; ways of cutting stages need stages."""
    small = [layout for layout in first_of_each_row(layouts) if layout.ranks <= 4]
    found = [replace(layout, variant=variant) for variant in COMPARED for layout in small]
    return [layout for layout in found if is_legal(layout) and (layout.pipeline > 1 or "stages" not in layout.variant)]


def compare(
    layouts: list[Layout], num_steps: int = NUM_STEPS, tell: Callable[[Differences], None] = lambda found: None
) -> Differences:
    """Train layouts and what they are compared with.

    Args:
        tell: called after each group of layouts with its differences.
    """
    references: dict[Layout, Curve] = {}

    def differences(found: dict[Layout, list[Curve]]) -> Differences:
        return {layout: difference(ranks, references[layout.reference]) for layout, ranks in found.items()}

    needed = dict.fromkeys(
        [layout.reference for layout in layouts] + [layout.reference.reference for layout in layouts]
    )
    references |= {layout: ranks[0] for layout, ranks in curves(needed, num_steps).items()}
    return differences(curves(layouts, num_steps, tell=lambda found: tell(differences(found))))


def worst(differences: Differences, layouts: Iterable[Layout]) -> tuple[float, float]:
    losses, norms = zip(*(differences[layout] for layout in layouts), strict=True)
    return max(losses), max(norms)


def row(*cells: Any) -> str:
    return "| " + " | ".join(f"{cell:.1e}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"


def table(*names: str) -> list[str]:
    return [row(*names), "|---" * len(names) + "|"]


INTRODUCTION = f"""# Layouts

Every layout trains the same model; it is a matter of speed and memory alone. `make matrix` trains a tiny model in every
combination of sizes that the rules allow at 2, 4 and 8 ranks (gloo, on CPUs), compares the loss and the gradient norm
of each of {NUM_STEPS} steps, on every rank, with one process that takes the whole batch at once without ZeRO, and
writes this page. A tenth of it is part of `make test`.

A row of the tables is a combination of tensor, pipeline, context and data parallel sizes, ZeRO stage and sequence
parallelism. Its runs are those without, with full and with selective activation checkpointing, with one and with two
micro-batches a step (two and four with stages), as far as they divide the batch of {GLOBAL_BATCH_SIZE}; one more is in
bf16. Figures are the largest relative differences. Of each sequence's labels another share is masked.
"""

ROUNDING_TOLD = """bf16 has 8 significant bits, so one process in bf16 lies off one in fp32, by rounding alone. Two
layouts in bf16 round other partial sums, and each may lie so far off, to either side: twice that is allowed.
"""

VARIANTS_TOLD = """Other models, optimizers and ways to keep and to cut, for each combination of sizes at 2 and 4 ranks
that allows them. With Adafactor whole heads rotate: it divides gradients by their own size, also one that is rounding
alone, as that of the bias of a key that does not rotate.
"""


def page(differences: Differences) -> str:
    """The tables of all layouts in Markdown."""
    product = [layout for layout in differences if layout.precision == "fp32" and not layout.variant]
    variants = [layout for layout in differences if layout.variant]
    bf16 = {(layout.ranks, layout.sizes): layout for layout in differences if layout.precision == "bf16"}
    lines = [INTRODUCTION, *table("", "runs", "loss", "tolerance", "gradient norm", "tolerance")]
    for name, layouts in (
        ("fp32: every combination", product),
        ("fp32: variants", variants),
        ("bf16 of one process against fp32", ROUNDED),
        ("bf16: every combination of sizes", [layout for layout in bf16.values() if layout.ranks > 1]),
    ):
        (loss, norm), (loss_limit, norm_limit) = worst(differences, layouts), layouts[0].tolerance
        lines.append(row(name, len(layouts), loss, loss_limit, norm, norm_limit))
    lines += ["", ROUNDING_TOLD]
    for ranks in AXES["ranks"]:
        rows = defaultdict(list)
        for layout in product:
            if layout.ranks == ranks:
                rows[layout.sizes].append(layout)
        lines += [f"## {ranks} ranks", ""]
        lines += table("TP", "PP", "CP", "DP", "ZeRO", "SP", "runs", "loss", "norm", "bf16 loss", "bf16 norm")
        for sizes, layouts in rows.items():
            cells = (*sizes[:-1], "yes" if sizes[-1] else "")
            lines.append(row(*cells, len(layouts), *worst(differences, layouts), *differences[bf16[ranks, sizes]]))
        lines.append("")
    lines += ["## Variants", "", VARIANTS_TOLD, *table("", "ranks", "runs", "loss", "norm")]
    for variant, ranks in itertools.product(COMPARED, AXES["ranks"]):
        layouts = [layout for layout in variants if (layout.variant, layout.ranks) == (variant, ranks)]
        if layouts:
            lines.append(row(variant, ranks, len(layouts), *worst(differences, layouts)))
    return "\n".join(lines) + "\n"


def code() -> str:
    """SHA-256 of what the figures depend on."""
    found = hashlib.sha256(f"{torch.__version__} {deepspeed.__version__}".encode())
    for path in (*sorted((PAGE.parents[1] / "megakor").rglob("*.py")), Path(__file__).with_name("tiny.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def kept(identity: str) -> Differences:
    """What an earlier run of the same code has found."""
    if not KEPT.exists():
        return {}
    lines = [json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()]
    return {Layout(**line["layout"]): tuple(line["found"]) for line in lines if line["code"] == identity}


def keep(identity: str, found: Differences) -> None:
    KEPT.parent.mkdir(exist_ok=True)
    with KEPT.open("a", encoding="utf-8") as file:
        for layout, values in found.items():
            file.write(json.dumps({"code": identity, "layout": asdict(layout), "found": values}) + "\n")


def main() -> None:
    product = every()
    layouts = [*ROUNDED, *product, *with_variants(product), *in_bf16(product)]
    identity = code()
    differences = {layout: values for layout, values in kept(identity).items() if layout in set(layouts)}
    started, done = time.monotonic(), len(differences)

    def tell(found: Differences) -> None:
        nonlocal done
        keep(identity, {layout: values for layout, values in found.items() if holds(layout, values)})
        done += len(found)
        loss, norm = worst(found, found)
        seconds = time.monotonic() - started
        print(f"{done} of {len(layouts)} runs, {seconds:.0f} s: loss {loss:.1e}, norm {norm:.1e}", file=sys.stderr)
        for layout, values in found.items():
            if not holds(layout, values):
                print(f"  OUT OF TOLERANCE: {layout}: loss {values[0]:.1e}, norm {values[1]:.1e}", file=sys.stderr)

    differences |= compare([layout for layout in layouts if layout not in differences], tell=tell)
    failed = [layout for layout in layouts if not holds(layout, differences[layout])]
    minutes = (time.monotonic() - started) / 60
    print(f"{len(layouts)} runs in {minutes:.0f} minutes, {len(failed)} out of tolerance", file=sys.stderr)
    if failed:
        sys.exit(1)
    PAGE.write_text(page({layout: differences[layout] for layout in layouts}), encoding="utf-8")


if __name__ == "__main__":
    main()
