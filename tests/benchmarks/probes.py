"""What this machine's cores, memory and links do, measured: a `Hardware` of one core for each rank of a gloo group.

All ranks probe at the same time, as they work at the same time. Products and attention have the sizes that a model's
have; none of it is a training step. Probes are taken in turns between steps, so that both see the machine alike.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch.nn import functional

from megakor.config.schema import ModelConfig, Precision
from megakor.plan.hardware import Hardware
from megakor.plan.work import FP32, Product
from megakor.train.device import DTYPES

SECONDS = 0.25
"""Of each probe in a turn."""
STREAM = 2**24
"""Numbers in each tensor of the probe of memory: far more than a cache holds."""
MESSAGE = 2**21
"""Numbers in the message of the probe of links."""


class Probes:
    """The probes of a rank; every rank makes one, and takes its turns with the others.

    Args:
        rows: tokens of a micro-batch, one sequence.
    """

    def __init__(self, model: ModelConfig, rows: int, precision: Precision) -> None:
        dtype, hidden, inner = DTYPES[precision], model.hidden_size, model.intermediate_size
        heads, self.size = model.num_attention_heads, dist.get_world_size()
        states, weight = torch.randn(rows, hidden, dtype=dtype), torch.randn(inner, hidden, dtype=dtype)
        gradient = torch.randn(rows, inner, dtype=dtype)
        shape = (1, heads, rows, hidden // heads)
        parts = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
        left, right, out = (torch.ones(STREAM) for _ in range(3))

        def products() -> None:
            functional.linear(states, weight)
            gradient.matmul(weight)
            gradient.t().matmul(states)

        def attention() -> None:
            functional.scaled_dot_product_attention(*parts, is_causal=True).backward(torch.ones(shape, dtype=dtype))

        self.product = Product(rows, hidden, inner)
        self.item_size = precision.itemsize
        self.attention_flops = 3.5 * 2 * heads * rows**2 * shape[3]
        self.probes: dict[str, Callable[[], object]] = {
            "memory": partial(torch.add, left, right, out=out),
            "products": products,
            "attention": attention,
        }
        self.messages = {
            "small": partial(dist.all_reduce, torch.ones(1)),
            "large": partial(dist.all_reduce, torch.ones(MESSAGE)),
            "gather": partial(dist.all_gather_into_tensor, torch.ones(self.size * MESSAGE), torch.ones(MESSAGE)),
        }
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def turn(self) -> None:
        """Probe for a second or so."""
        for name, probe in self.probes.items():
            probe()
            dist.barrier()
            start = time.perf_counter()
            while (elapsed := time.perf_counter() - start) < SECONDS:
                probe()
                self.counts[name] += 1
            self.seconds[name] += elapsed
        for name, message in self.messages.items():
            message()
            dist.barrier()
            start = time.perf_counter()
            for _ in range(10):
                message()
            self.seconds[name] += time.perf_counter() - start
            self.counts[name] += 10

    def hardware(self) -> Hardware:
        """What the turns found, mean over ranks; every rank calls."""
        taken = {name: self.seconds[name] / self.counts[name] for name in self.counts}
        memory = 3 * FP32 * STREAM / taken["memory"]
        # A plan counts the time of moving a product's operands apart.
        moving = 3 * self.product.num_bytes(self.item_size) / memory
        matmul = 3 * self.product.flops / (taken["products"] - moving)
        share = 2 * (self.size - 1) / self.size
        link = share * MESSAGE * FP32 / (taken["large"] - taken["small"]) if self.size > 1 else memory
        gathering = (self.size - 1) * MESSAGE * FP32 / link
        passes = (taken["gather"] - taken["small"] / 2) / gathering if self.size > 1 else 1.0
        figures = [memory, matmul, self.attention_flops / taken["attention"], link, taken["small"] / 2, passes]
        found = torch.tensor(figures, dtype=torch.float64)
        dist.all_reduce(found)
        memory, matmul, attention, link, latency, passes = (found / self.size).tolist()
        return Hardware(
            name="cpu", measured=True, memory_gib=8.0, bf16_tflops=matmul / 1e12, fp16_tflops=matmul / 1e12,
            fp32_tflops=matmul / 1e12, matmul_efficiency=1.0, attention_efficiency=attention / matmul,
            memory_efficiency=1.0, link_efficiency=1.0, memory_gb_per_s=memory / 1e9, node_gb_per_s=link / 1e9,
            network_gb_per_s=link / 1e9, node_latency_us=latency * 1e6, network_latency_us=latency * 1e6,
            host_gb_per_s=memory / 1e9, host_memory_gb_per_s=memory / 1e9, watts=50.0, per_node=self.size,
            overlaps=False, gather_passes=passes,
        )  # fmt: skip
