"""What an accelerator, its node and its network can do: YAML files go in, `Hardware` and times of collectives come out.

The files of the known kinds are in `configs/hardware`. A path to a file with the same keys serves as a kind, too.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megakor.config.choices import Precision
from megakor.config.compose import config_folder

FITTED = {"matmul_efficiency": 0.8, "memory_efficiency": 0.89, "attention_efficiency": 0.3, "link_efficiency": 0.89}
"""Shares of a data sheet's rates that use reaches, where a file does not say: fitted (docs/validation.md)."""
MEASURED = dict.fromkeys(FITTED, 1.0)
"""Of rates that were measured in use."""


@dataclass(frozen=True)
class Hardware:
    """An accelerator, its share of its node, and the network between nodes.

    Rates of links are of one accelerator, in one direction.

    Attributes:
        name: as `cluster.gpus` names it.
        measured: whether rates were measured in use; otherwise they are a data sheet's, of which use reaches a part.
        memory_gib: device memory that a process can have, GiB.
        bf16_tflops: peak of dense matrix products with fp32 sums, TFLOP/s; so are `fp16_tflops` and `fp32_tflops`.
        matmul_efficiency: share of the peak that the arithmetic of large products reaches.
        attention_efficiency: share of the peak that fused attention reaches, the masked half not counted.
        memory_efficiency: share of the memory's bandwidth that operations bound by it reach.
        link_efficiency: share of a link's rate that large collectives reach.
        memory_gb_per_s: bandwidth of the device's memory, GB/s.
        node_gb_per_s: links to the other accelerators of the node, GB/s.
        network_gb_per_s: share of the node's network, GB/s.
        node_latency_us: of a message within the node, µs.
        network_latency_us: of a message between nodes, µs.
        host_gb_per_s: link to the host's memory, GB/s.
        host_memory_gb_per_s: share of the bandwidth of the host's memory, GB/s.
        watts: power of an accelerator at work with its share of the node, W.
        per_node: accelerators of a node.
        overlaps: whether communication runs beside computation; not where the same cores do both.
    """

    name: str
    measured: bool
    memory_gib: float
    bf16_tflops: float
    fp16_tflops: float
    fp32_tflops: float
    matmul_efficiency: float
    attention_efficiency: float
    memory_efficiency: float
    link_efficiency: float
    memory_gb_per_s: float
    node_gb_per_s: float
    network_gb_per_s: float
    node_latency_us: float
    network_latency_us: float
    host_gb_per_s: float
    host_memory_gb_per_s: float
    watts: float
    per_node: int
    overlaps: bool = True

    def peak(self, precision: Precision) -> float:
        """Peak of matrix products in an arithmetic, FLOP/s."""
        tflops = {
            Precision.bf16: self.bf16_tflops,
            Precision.fp16: self.fp16_tflops,
            Precision.fp32: self.fp32_tflops,
        }
        return tflops[precision] * 1e12


@dataclass(frozen=True)
class Ring:
    """The ranks of a collective and where they are.

    Attributes:
        size: ranks.
        in_node: of them, on one node.
    """

    size: int
    in_node: int

    @classmethod
    def of(cls, size: int, stride: int, per_node: int) -> Ring:
        """`size` ranks whose numbers are `stride` apart, on nodes of `per_node` ranks."""
        return cls(size, max(1, min(size, per_node // stride)))

    def seconds(self, kind: str, num_bytes: float, hardware: Hardware) -> float:
        """Time of a collective whose whole tensor has so many bytes.

        Rings move (n - 1) / n of the tensor for a gather, a scatter or an exchange, twice that for an all-reduce
        (Patarasuk and Yuan 2009); ranks of a group that share a node use its network links together. An all-reduce
        of little goes up and down a tree, so its latency grows with the logarithm.

        Args:
            kind: all_reduce, all_gather, reduce_scatter, all_to_all, or send, which a rank does to its neighbour.
        """
        if self.size == 1:
            return 0.0
        inside = self.in_node == self.size
        rate = (
            hardware.node_gb_per_s if inside else min(hardware.node_gb_per_s, self.in_node * hardware.network_gb_per_s)
        )
        latency = 1e-6 * (hardware.node_latency_us if inside else hardware.network_latency_us)
        hops = 2 * math.ceil(math.log2(self.size)) if kind == "all_reduce" else self.size - 1
        share = 1.0 if kind == "send" else (self.size - 1) / self.size
        passes = 2 if kind == "all_reduce" else 1
        return passes * share * num_bytes / (rate * 1e9 * hardware.link_efficiency) + hops * latency


def hardware_folder() -> Path:
    """The folder of the known kinds."""
    return config_folder() / "hardware"


def known_hardware() -> list[str]:
    """Names of the known kinds."""
    return sorted(path.stem for path in hardware_folder().glob("*.yaml"))


def find_hardware(kind: str) -> Hardware:
    """A known kind by its name, or one described by a YAML file.

    Raises:
        ValueError: nobody knows it, or the file lacks a key, has one too many, or a figure that is not above 0.
    """
    given = Path(kind)
    if given.suffix in (".yaml", ".yml"):
        if not given.is_file():
            raise ValueError(f"hardware {kind} must be a file that is there")
        return read_hardware(given)
    if kind not in known_hardware():
        raise ValueError(
            f"hardware {kind} must be one of {', '.join(known_hardware())}, "
            f"or a YAML file with the keys of {hardware_folder() / 'a100-80g.yaml'}"
        )
    return read_hardware(hardware_folder() / f"{kind}.yaml")


def read_hardware(path: Path) -> Hardware:
    """The hardware that a file describes; its name is the file's.

    Raises:
        ValueError: a key is missing or unknown, or a figure is not above 0.
    """
    figures: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(figures, dict):
        raise ValueError(f"{path} must hold keys and figures")
    fields = {field.name: field for field in dataclasses.fields(Hardware) if field.name != "name"}
    needed = {name for name, field in fields.items() if field.default is dataclasses.MISSING} - FITTED.keys()
    for key in sorted(figures.keys() - fields.keys()):
        raise ValueError(f"{path}: {key} must be one of {', '.join(fields)}")
    for key in sorted(needed - figures.keys()):
        raise ValueError(f"{path}: {key} must be given")
    for key, value in figures.items():
        wanted = bool if fields[key].type == "bool" else int if fields[key].type == "int" else (int, float)
        if not isinstance(value, wanted) or (wanted is not bool and (isinstance(value, bool) or not value > 0)):
            rule = (
                "true or false" if wanted is bool else "a whole number above 0" if wanted is int else "a number above 0"
            )
            raise ValueError(f"{path}: {key}={value} must be {rule}")
    return Hardware(name=path.stem, **{**(MEASURED if figures["measured"] else FITTED), **figures})
