"""The page that holds the plan against what others published and what this machine measured.

    python -m tests.plan.validation

Rows come from `tests.plan.published`, `tests.plan.memory` and `tests.plan.machine`; docs/validation.md is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from megakor.config.schema import ClusterConfig
from megakor.model.flops import train_flops_per_token
from megakor.model.specs import num_parameters
from megakor.plan.hardware import find_hardware
from megakor.plan.memory import GIB
from tests.plan import machine, memory, published

PAGE = Path(__file__).parents[2] / "docs" / "validation.md"
PARAMETERS = {"1.3B": 1_331_810_304, "3.8B": 3_809_974_272, "5.8B": 5_885_059_072, "12.8B": 12_893_603_840}
"""The model cards' counts with 30,080 rows; that of 12.8B is the architecture's, its card states 5,027,840 more."""
WEEKS = {"1.3B": (1, 2, 213e9), "3.8B": (2, 3, 219e9), "5.8B": (3, 4, 172e9), "12.8B": (7, 8, 167e9)}
"""Polyglot-Ko's reported calendar weeks on 256 A100s, and tokens."""
NUM_GPUS = 256
A100_FLOPS = 312e12
HOURS_OF_WEEK = 168
FAR = 20
"""Differences above it are told, %."""
COSTS = ((300e6, 3), (400e6, 4))
"""Won and weeks, as reported."""

TEXT = Path(__file__).with_name("page.md")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def absolute_median(rows: Iterable[Any]) -> str:
    found = [abs(row.difference) for row in rows]
    return f"{median(found):.1f} %"


def summary(speed: list[published.Row], sizes: list[memory.MemoryRow], runs: list[machine.MachineRow]) -> str:
    held = [row for row in speed if not row.fitted]
    lines = [
        ["utilization, all rows", str(len(speed)), absolute_median(speed)],
        ["utilization, rows that nothing was fitted on", str(len(held)), absolute_median(held)],
    ]
    for source in dict.fromkeys(row.source for row in held):
        chosen = [row for row in held if row.source == source]
        lines.append([f"of them {source}", str(len(chosen)), absolute_median(chosen)])
    exact = [row for row in sizes if not row.bound]
    lines.append(["published memory", str(len(exact)), absolute_median(exact)])
    for what, found in (
        ("memory", [abs(row.memory_difference) for row in runs]),
        ("time of a step", [abs(row.time_difference) for row in runs]),
    ):
        lines.append([f"{what} on this machine", str(len(found)), f"{median(found):.1f} %"])
    return table(["", "rows", "median of the absolute difference"], lines)


def constants() -> str:
    a100, h100 = find_hardware("a100-80g"), find_hardware("h100")
    return table(
        ["share of", "that is reached"],
        [
            ["the peak, by large products on A100", f"{a100.matmul_efficiency:.2f}"],
            ["the peak, by large products on H100", f"{h100.matmul_efficiency:.2f}"],
            ["the peak, by fused attention, its masked half not counted", f"{a100.attention_efficiency:.2f}"],
            ["memory bandwidth", f"{a100.memory_efficiency:.2f}"],
            [
                "a link's rate: by NCCL's authors (NVIDIA/nccl-tests, issue 212), not fitted",
                f"{a100.link_efficiency:.2f}",
            ],
        ],
    )


def speed_tables(rows: list[published.Row]) -> str:
    """One table for each source."""
    found = []
    for source in dict.fromkeys(row.source for row in rows):
        lines = [
            [
                row.name,
                sizes
                if (sizes := f"{row.parallel.tensor_parallel_size}/{row.parallel.pipeline_parallel_size}") != "1/1"
                else "",
                str(row.train.micro_batch_size),
                row.train.activation_checkpointing.value,
                f"{row.published:.1f}",
                f"{row.predicted():.1f}",
                f"{row.difference:+.1f} %",
                "fitted" if row.fitted else "",
            ]
            for row in rows
            if row.source == source
        ]
        header = ["run", "TP/PP", "micro-batch", "recomputed", "published", "predicted", "difference", ""]
        text = f"### {source}\n\n{table(header, lines)}"
        notes = dict.fromkeys(row.assumed for row in rows if row.source == source and row.assumed)
        if notes:
            text += "\n\nAssumed: " + "; ".join(notes) + "."
        found.append(text)
    return "\n\n".join(found)


def worst(rows: list[published.Row]) -> str:
    """How many rows are how far off, and which are the farthest."""
    far = [row for row in rows if abs(row.difference) > FAR]
    named = sorted(far, key=lambda row: -abs(row.difference))[:8]
    listed = "; ".join(f"{row.name} ({row.source}) {row.difference:+.0f} %" for row in named)
    return f"{len(far)} of {len(rows)} rows are off by more than {FAR} %. The farthest: {listed}."


def memory_table(rows: list[memory.MemoryRow]) -> str:
    lines = [
        [
            row.source,
            row.name,
            f"{row.published / GIB:.2f}",
            f"{row.predicted / GIB:.2f}",
            f"{row.predicted / row.published:.2f} of it" if row.bound else f"{row.difference:+.1f} %",
            row.how,
        ]
        for row in rows
    ]
    return table(["source", "figure", "published GiB", "predicted GiB", "difference", "how"], lines)


def machine_table(rows: list[machine.MachineRow]) -> str:
    lines = [
        [
            row.name,
            f"{row.returned_seconds:.2f}",
            f"{row.seconds:.2f}",
            f"{row.time.seconds:.2f}",
            f"{row.time_difference:+.1f} %",
            f"{row.num_bytes / GIB:.2f}",
            f"{row.planned_bytes / GIB:.2f}",
            f"{row.memory_difference:+.1f} %",
            f"{row.hardware.bf16_tflops * 1000:.0f}",
            f"{row.hardware.memory_gb_per_s:.1f}",
            f"{row.hardware.node_gb_per_s:.2f}" if row.hardware.per_node > 1 else "",
        ]
        for row in rows
    ]
    header = [
        "layout", "step, s, memory given back", "step, s, memory kept", "planned", "", "GiB a rank", "planned", "",
        "GFLOP/s", "memory, GB/s", "link, GB/s",
    ]  # fmt: skip
    return table(header, lines)


def calendar_table() -> str:
    lines = []
    for name, (fewest, most, tokens) in WEEKS.items():
        flops = train_flops_per_token(memory.POLYGLOT[name], 2048) * tokens
        implied = [100 * flops / (weeks * HOURS_OF_WEEK * 3600 * NUM_GPUS * A100_FLOPS) for weeks in (most, fewest)]
        lines.append([name, f"{tokens / 1e9:.0f}B", f"{fewest} to {most}", f"{implied[0]:.1f} to {implied[1]:.1f} %"])
    return table(["model", "tokens", "weeks on 256 A100s", "implied utilization"], lines)


def price() -> float:
    """Won for an hour of one accelerator, rounded down, of both ends of what is reported."""
    found = {int(won / (NUM_GPUS * weeks * HOURS_OF_WEEK)) for won, weeks in COSTS}
    (one,) = found
    return one


def page() -> str:
    """The whole page."""
    speed, sizes, runs = published.rows(), memory.rows(), machine.rows()
    fitted = sum(row.fitted for row in speed)
    assert price() == ClusterConfig().price_krw
    counts = [
        [name, f"{PARAMETERS[name]:,}", f"{num_parameters(model):,}", f"{num_parameters(model) - PARAMETERS[name]:,}"]
        for name, model in memory.POLYGLOT.items()
    ]
    return TEXT.read_text(encoding="utf-8").format(
        summary=summary(speed, sizes, runs),
        constants=constants(),
        num_fitted=fitted,
        num_rows=len(speed),
        num_held=len(speed) - fitted,
        parameters=table(["Polyglot-Ko", "its card", "planned", "difference"], counts),
        speed=speed_tables(speed),
        worst=worst(speed),
        memory=memory_table(sizes),
        eight=memory.of_eight(),
        machine=machine_table(runs),
        calendar=calendar_table(),
        costs="3 to 4 hundred million won for 3 to 4 weeks of 256 A100s",
        price=price(),
    )


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
