"""A plan in print: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from megakor.plan.memory import GIB
from megakor.plan.plan import Plan, inference_gb
from megakor.plan.traffic import Traffic

WIDTH = 160  # columns that the widest table needs
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

MEMORY_NOTE = """\
Bytes at the fullest moment of a step. Gradients are in fp32; the optimizer is fp32 masters and moments. Buffers: of
pipeline neighbours, DeepSpeed's buckets, gathered weights. Margin: 1.5 GiB of libraries and 5 % of what comes and goes
for the allocator's gaps, both assumed."""
TIME_NOTE = """\
Assumed: messages of tensor ranks are waited for, but for those that a column linear starts in its backward pass,
beside its products; ZeRO-1 and 2 wait for all messages of replicas, ZeRO-3 for what takes longer than the passes;
stages wait for what they send; the update runs beside nothing. Loading data, evaluation, checkpoints and restarts are
not counted."""


def size(num_bytes: float) -> str:
    """Bytes in the unit that leaves one to four digits before the point."""
    value, unit = float(num_bytes), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {UNITS[unit]}" if unit == 0 or value >= 100 else f"{value:.2f} {UNITS[unit]}"


def new_table(left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    """A table without borders; columns of words, then columns of figures."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in left:
        table.add_column(column, no_wrap=True)
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def new_console() -> Console:
    """Standard output, wide enough for every table."""
    return Console(width=max(WIDTH, Console().width), highlight=False)


def summed_traffic(traffic: list[list[Traffic]]) -> dict[str, int]:
    """Of each axis and kind, the bytes of the stage that has most."""
    most: Counter[str] = Counter()
    for stage in traffic:
        for found in stage:
            name = f"{found.axis} {found.kind}"
            most[name] = max(most[name], found.num_bytes)
    return dict(most)


def as_json(plan: Plan) -> str:
    """All figures as one JSON object; memory in GiB, times in seconds where not named otherwise."""
    time, cost, dims = plan.time, plan.cost, plan.dims
    stages = [
        {
            "stage": stage.stage,
            "holds": stage.holds,
            "parameters": stage.parameters,
            "in_flight": stage.in_flight,
            "moment": stage.moment,
            **{name: num_bytes / GIB for name, num_bytes in stage.parts.items()},
            "total": stage.total / GIB,
        }
        for stage in plan.stages
    ]
    figures: dict[str, Any] = {
        "name": plan.name,
        "hardware": plan.hardware.name,
        "gpus": dims.world_size,
        "layout": {
            "tensor": dims.tensor,
            "pipeline": dims.pipeline,
            "context": dims.context,
            "data": dims.data,
            "sequence_parallel": dims.sequence_parallel,
            "zero_stage": plan.zero_stage,
            "micro_batch_size": plan.micro_batch_size,
            "num_micro_batches": plan.num_micro_batches,
        },
        "parameters": sum(plan.parameters.values()),
        "parameters_by_part": plan.parameters,
        "trained_parameters": plan.trained,
        "memory_gib_per_gpu": plan.fullest.total / GIB,
        "memory_gib_available": plan.hardware.memory_gib,
        "fits": plan.fits,
        "stages": stages,
        "communication_bytes_per_step": summed_traffic(plan.traffic),
        "model_flops_per_step": time.model_flops,
        "hardware_flops_per_step": time.hardware_flops,
        "step_seconds": time.seconds,
        "step_seconds_by_part": time.parts,
        "recompute_seconds": time.recompute,
        "mfu": time.mfu,
        "hfu": time.hfu,
        "num_steps": plan.num_steps,
        "tokens": plan.tokens,
        "tokens_per_second": plan.tokens / plan.num_steps / time.seconds,
        "days": cost.days,
        "gpu_hours": cost.gpu_hours,
        "kwh": cost.kwh,
        "cost_krw": cost.krw,
        "cost_usd": cost.usd,
        "inference_gb_by_the_quick_rule": {
            bits: inference_gb(sum(plan.parameters.values()), bits) for bits in (32, 16)
        },
    }
    return json.dumps(figures)


def memory_table(plan: Plan) -> Table:
    """Memory of a rank of each stage, GiB."""
    table = new_table(("stage", "holds"), ("in flight", *plan.stages[0].parts, "total", "of GPU"))
    for stage in plan.stages:
        sizes = [f"{num_bytes / GIB:.2f}" for num_bytes in (*stage.parts.values(), stage.total)]
        share = f"{stage.total / plan.capacity:.0%}"
        table.add_row(str(stage.stage), stage.holds, str(stage.in_flight), *sizes, share)
    return table


def time_table(plan: Plan) -> Table:
    """Where the time of a step goes."""
    table = new_table(("a step",), ("ms", "share"))
    for name, seconds in plan.time.parts.items():
        if seconds:
            table.add_row(name, f"{1000 * seconds:,.1f}", f"{seconds / plan.time.seconds:.1%}")
    table.add_row("all", f"{1000 * plan.time.seconds:,.1f}", "100.0%")
    return table


def traffic_table(plan: Plan) -> Table:
    """What a rank puts into collectives and sends in a step; of the stages, the one that has most."""
    table = new_table(("axis and kind",), ("bytes a step",))
    for name, num_bytes in summed_traffic(plan.traffic).items():
        table.add_row(name, size(num_bytes))
    return table


def print_tables(plan: Plan) -> None:
    """The figures for people, on standard output."""
    dims, time, cost, console = plan.dims, plan.time, plan.cost, new_console()
    axes = f"tensor {dims.tensor} × pipeline {dims.pipeline} × context {dims.context} × data {dims.data}"
    sequence = ", sequence parallel" if dims.sequence_parallel else ""
    total = sum(plan.parameters.values())
    parts = ", ".join(f"{name.replace('_', '-')} {count:,}" for name, count in plan.parameters.items())
    trained = "" if plan.trained == total else f"\nTrained: {plan.trained:,} parameters of adapters"
    console.print(
        f"{plan.name}: {dims.world_size} × {plan.hardware.name} = {axes}{sequence}, ZeRO-{plan.zero_stage}\n"
        f"A step: {plan.num_micro_batches} micro-batches of {plan.micro_batch_size} × {plan.sequence_length:,} tokens "
        f"in each of {dims.data} replicas; {plan.num_steps:,} steps are {plan.tokens / 1e9:,.1f} billion tokens\n"
        f"{total:,} parameters: {parts}{trained}\n\n"
        f"Memory of a rank of each stage, GiB of {plan.hardware.memory_gib:g}:"
    )
    console.print(memory_table(plan))
    console.print(f"\n{MEMORY_NOTE}\n")
    console.print(time_table(plan))
    console.print(
        f"\nModel FLOPs {time.model_flops:.3g} a step, with recomputation {time.hardware_flops:.3g}; "
        f"MFU {time.mfu:.1%}, HFU {time.hfu:.1%}, {plan.tokens / plan.num_steps / time.seconds:,.0f} tokens/s\n"
        f"{TIME_NOTE}\n"
    )
    console.print(traffic_table(plan))
    console.print(
        f"\n{cost.days:,.1f} days, {cost.gpu_hours:,.0f} GPU-hours, {cost.kwh:,.0f} kWh, "
        f"{cost.krw:,.0f} KRW, {cost.usd:,.0f} USD\n\n"
        f"For inference only: the quick rule P × 4 B / (32 / Q) × 1.2 tells {inference_gb(total, 32):,.1f} GB at 32 "
        f"bits and {inference_gb(total, 16):,.1f} GB at 16. Training takes what stands above."
    )
