"""The measured machines as a kind of hardware for `megakor plan`: probes of every rank go in, a YAML file comes out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2
from pathlib import Path

import yaml

from megakor.config.schema import Precision, PretrainConfig
from megakor.files import atomic_write
from megakor.preflight.report import Report
from megakor.train.device import attention_tflops, copy_gb_per_s, is_cpu, matmul_tflops

PROBE_SECONDS = 0.5


@dataclass(frozen=True)
class Probe:
    """What a rank's device does while all others do the same. TFLOP/s and GB/s.

    Attributes:
        attention_efficiency: rate of causal attention over that of matmuls, in the run's arithmetic.
    """

    bf16_tflops: float
    fp16_tflops: float
    fp32_tflops: float
    memory_gb_per_s: float
    host_gb_per_s: float
    host_memory_gb_per_s: float
    attention_efficiency: float


def probe(config: PretrainConfig) -> Probe:
    """Measure this rank's device; a few seconds."""
    model, train = config.model, config.train
    head_dim = model.hidden_size // model.num_attention_heads
    tflops = {f"{precision.value}_tflops": matmul_tflops(precision, PROBE_SECONDS) for precision in Precision}
    copies = zip(("memory", "host", "host_memory"), copy_gb_per_s(PROBE_SECONDS), strict=True)
    attention = attention_tflops(train.precision, model.num_attention_heads, train.sequence_length, head_dim)
    efficiency = attention / tflops[f"{train.precision.value}_tflops"]
    return Probe(**tflops, **{f"{name}_gb_per_s": rate for name, rate in copies}, attention_efficiency=efficiency)


def hardware(report: Report, probes: Sequence[Probe], watts: float) -> dict[str, float | int | bool]:
    """The keys of a kind of hardware. Medians over ranks and links.

    A message's latency is that of an all-reduce of one number over its 2 ⌈log₂ n⌉ steps. Where there is one node, or
    one rank on each, the links that there are stand for the others.

    Raises:
        ValueError: one rank alone has no links.
    """
    nodes, per_node = report.nodes, max(len(node.ranks) for node in report.nodes)
    inside = [(node.node_gb_per_s, (node.node_latency_us or 0) / (2 * ceil(log2(len(node.ranks))))) for node in nodes
              if node.node_gb_per_s]  # fmt: skip
    between = [(link.gb_per_s, link.latency_us / 2) for link in report.links]
    if not inside and not between:
        raise ValueError("out= must be asked of at least two ranks: one has no links to measure")
    node, network = ([statistics.median(one) for one in zip(*(links), strict=True)]
                     for links in (inside or between, between or inside))  # fmt: skip
    rates = {name: statistics.median(getattr(one, name) for one in probes) for name in Probe.__dataclass_fields__}
    figures = {
        "memory_gib": nodes[0].device_total / 2**30 / (per_node if is_cpu() else 1),
        **rates,
        "node_gb_per_s": node[0],
        "network_gb_per_s": network[0],
        "node_latency_us": node[1],
        "network_latency_us": network[1],
        "watts": watts,
    }
    rounded = {name: float(f"{figure:.4g}") for name, figure in figures.items()}
    return {"measured": True, **rounded, "per_node": per_node, "overlaps": not is_cpu()}


def write_hardware(path: Path, report: Report, probes: Sequence[Probe], watts: float) -> None:
    """Write the file; ValueError as `hardware`, OSError where it cannot be written."""
    keys = yaml.safe_dump(hardware(report, probes, watts), sort_keys=False)
    with atomic_write(path) as file:
        file.write(f"# Measured by megakor preflight on {report.world_size} ranks; watts as given.\n{keys}".encode())
