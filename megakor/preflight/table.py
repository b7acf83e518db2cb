"""A preflight's report in print: one table for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json

from rich.console import Console
from rich.table import Table

from megakor.preflight.compare import counted, listed
from megakor.preflight.report import NodeReport, Report

GIB = 2**30
WIDTH = 150  # columns that the table needs
LEFT = ("node", "ranks", "address", "device")
RIGHT = ("free", "host", "/dev/shm", "clock", "matmul", "in node", "latency", "between", "latency")
UNITS = ("", "", "", "", "GiB", "GiB", "GiB", "ms", "TFLOP/s", "GB/s", "µs", "GB/s", "µs")


def as_json(report: Report) -> str:
    """All of it as one JSON object: bytes, seconds, TFLOP/s, GB/s, µs."""
    return json.dumps(dataclasses.asdict(report), ensure_ascii=False)


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many digits that count; empty where there is none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def row(node: NodeReport) -> list[str]:
    """A node's cells."""
    devices = f"{len(node.ranks)} of {node.num_devices} × {node.device}" if node.num_devices else node.device
    clock = ""
    if node.clock_seconds is not None:
        clock = f"{1000 * node.clock_seconds:+.1f} ± {1000 * (node.clock_uncertainty or 0):.1f}"
    matmul = f"{number(min(node.matmul_tflops))}-{number(max(node.matmul_tflops))}" if node.matmul_tflops else ""
    free = (node.device_free, node.host_free, node.shared_free)
    return [
        node.label, listed(node.ranks).partition(" ")[2], f"{node.address} {node.interface}", devices,
        *(number(size / GIB) for size in free), clock, matmul, number(node.node_gb_per_s), number(node.node_latency_us),
        number(node.network_gb_per_s), number(node.network_latency_us),
    ]  # fmt: skip


def table(report: Report) -> Table:
    """A row for each node."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for number_of_column, (name, unit) in enumerate(zip((*LEFT, *RIGHT), UNITS, strict=True)):
        justify = "left" if number_of_column < len(LEFT) else "right"
        found.add_column(f"{name}\n{unit}", justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for node in report.nodes:
        found.add_row(*row(node))
    return found


def print_table(report: Report) -> None:
    """The report for people, on standard output; the faults at its end."""
    console = Console(width=max(WIDTH, Console().width), highlight=False, markup=False)
    software = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    ranks, nodes = counted(report.world_size, "rank"), counted(len(report.nodes), "node")
    console.print(f"{ranks} on {nodes}")
    if report.nodes:
        console.print(f"{software}, {report.packages} packages; configuration {report.configuration}\n", soft_wrap=True)
        console.print(table(report))
    for key, fingerprint in report.inputs.items():
        console.print(f"{key}: {fingerprint}")
    if report.disk_free is not None:
        size = f"; a checkpoint takes {report.checkpoint_bytes / GIB:,.3g} GiB" if report.checkpoint_bytes else ""
        console.print(f"run={report.run}: {report.disk_free / GIB:,.1f} GiB free{size}")
    done, full = report.rounds
    if done < full:
        console.print(f"{done} of {full} rounds of pairs of nodes were measured in the time there is")
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
    console.print(f"\n{sum(report.seconds.values()):.1f} s: {parts}")
    for fault in report.faults:
        console.print(f"FAULT {fault}", soft_wrap=True)
    console.print(counted(len(report.faults), "fault"))
