"""A simulation in print: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json

from rich.table import Table

from megakor.plan.table import new_console, new_table, size
from megakor.plan.traffic import Traffic
from megakor.simulate.layout import Simulation, Stage

FOOTNOTE = """\
kept: activations of one micro-batch between its passes; activations: those of all in flight, one of them at work.
* by formula (ZeRO, Rajbhandari et al. 2020, as DeepSpeed 0.19 does it), gradients in fp32. Not covered: DeepSpeed's own
  buffers, kernels' workspaces, the allocator's gaps, scalars such as the loss. Without a star: run on fake tensors.
Bytes are those of the tensors that a rank puts in: its own part of an all_gather, the whole tensor of the others."""


def as_json(simulation: Simulation) -> str:
    """All figures as one JSON object; sizes in bytes."""
    figures = dataclasses.asdict(simulation)
    for stage, found in zip(simulation.stages, figures["stages"], strict=True):
        found["memory"] = stage.memory
    return json.dumps(figures | {"world_size": simulation.dims.world_size})


def memory_table(stages: list[Stage]) -> Table:
    """What a rank of each stage holds and keeps."""
    right = ("parameters", "weights*", "gradients*", "optimizer*", "kept", "in flight", "activations", "memory")
    table = new_table(("stage", "holds"), right)
    for stage in stages:
        sizes = map(size, (stage.weights, stage.gradients, stage.optimizer, stage.kept))
        table.add_row(
            str(stage.stage), stage.holds, f"{stage.parameters:,}", *sizes, str(stage.in_flight),
            size(stage.activations), size(stage.memory),
        )  # fmt: skip
    return table


def traffic_table(stages: list[Stage]) -> Table:
    """What a rank of each stage sends."""
    table = new_table(("stage", "axis", "kind"), ("a micro-batch", "bytes", "a step", "bytes"))

    def cells(traffic: Traffic | None) -> tuple[str, str]:
        if traffic is None:
            return "", ""
        return "" if traffic.count is None else f"{traffic.count:,}", size(traffic.num_bytes)

    for stage in stages:
        once = {(traffic.axis, traffic.kind): traffic for traffic in stage.micro_batch}
        for traffic in stage.step:
            kind = traffic.kind + ("*" if traffic.count is None else "")
            each = once.get((traffic.axis, traffic.kind))
            table.add_row(str(stage.stage), traffic.axis, kind, *cells(each), *cells(traffic))
    return table


def print_tables(simulation: Simulation) -> None:
    """The figures for people, on standard output."""
    dims = simulation.dims
    console = new_console()
    axes = f"tensor {dims.tensor} × pipeline {dims.pipeline} × context {dims.context} × data {dims.data}"
    sequence = ", sequence parallel" if dims.sequence_parallel else ""
    console.print(
        f"{simulation.name}: {dims.world_size} ranks = {axes}{sequence}, ZeRO-{simulation.zero_stage}\n"
        f"A step: {simulation.num_micro_batches} micro-batches of {simulation.micro_batch_size} × "
        f"{simulation.sequence_length:,} tokens in each of {dims.data} replicas\n"
        f"{simulation.parameters:,} parameters: {dims.pipeline} stages × {dims.tensor} tensor ranks hold just these\n"
        "No forward or backward pass waits for the device: none depends on the values of a tensor\n\n"
        "A rank of each stage:"
    )
    console.print(memory_table(simulation.stages))
    console.print("\nWhat it puts into collectives and sends to its neighbours:")
    console.print(traffic_table(simulation.stages))
    console.print(f"\n{FOOTNOTE}")
