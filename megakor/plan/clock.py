"""How long a hardware takes: amounts of work go in, seconds come out."""

from __future__ import annotations

from dataclasses import dataclass

from megakor.config.choices import OptimizerName, Precision
from megakor.config.schema import ParallelConfig
from megakor.parallel.dims import ParallelDims
from megakor.plan.hardware import Hardware, Ring
from megakor.plan.work import FP32, ITEM_SIZE, Practice, Product, Work


@dataclass(frozen=True)
class Clock:
    """Times of work on a hardware, in an arithmetic, in a layout."""

    hardware: Hardware
    precision: Precision
    dims: ParallelDims

    @property
    def rate(self) -> float:
        """Arithmetic of large products, FLOP/s."""
        return self.hardware.peak(self.precision) * self.hardware.matmul_efficiency

    @property
    def memory_rate(self) -> float:
        """Bytes a second of operations bound by memory."""
        return self.hardware.memory_gb_per_s * 1e9 * self.hardware.memory_efficiency

    def product(self, product: Product) -> float:
        """Seconds of a matrix product."""
        return product.flops / self.rate + product.num_bytes(ITEM_SIZE[self.precision]) / self.memory_rate

    def compute(self, work: Work) -> float:
        """Seconds of everything but messages."""
        products = sum(self.product(product) * count for product, count in work.products.items())
        attention = self.hardware.peak(self.precision) * self.hardware.attention_efficiency
        return products + work.attention / attention + work.streamed / self.memory_rate

    def ring(self, axis: str) -> Ring:
        """The ranks of an axis: tensor, context or replicas."""
        dims, per_node = self.dims, self.hardware.per_node
        sizes = {"tensor": (dims.tensor, 1), "context": (dims.context, dims.tensor)}
        return Ring.of(*sizes.get(axis, (dims.replicas, dims.tensor)), per_node)

    def messages(self, work: Work, axis: str) -> float:
        """Seconds of waiting for messages."""
        waited, ring = 0.0, self.ring(axis)
        for message, count in work.messages.items():
            if message.axis == axis:
                seconds = ring.seconds(message.kind, message.num_bytes, self.hardware)
                if message.beside is not None and self.hardware.overlaps:
                    seconds = max(0.0, seconds - self.product(message.beside))
                waited += seconds * count
        return waited


def replica_seconds(
    clock: Clock, parallel: ParallelConfig, practice: Practice, trained: float, held: float, passes: float, count: int
) -> float:
    """Waiting for replicas in a step: gradients are summed and weights gathered as `megakor.simulate.formulas` says.

    Args:
        trained: weights of a rank that have gradients; of `held`.
        passes: seconds of a micro-batch's passes, which messages that are hidden run beside.
        count: micro-batches.
    """
    ring, hardware, size, stage = (
        clock.ring("replicas"),
        clock.hardware,
        ITEM_SIZE[clock.precision],
        parallel.zero_stage,
    )
    wide = FP32 if practice.wide_gradients or (stage == 1 and clock.precision is Precision.bf16) else size
    if stage == 3:
        gather = ring.seconds("all_gather", size * held, hardware)
        scatter = ring.seconds("reduce_scatter", wide * trained, hardware)
        seconds, hidden = count * (2 * gather + scatter), count * passes
    else:
        reduce = ring.seconds("all_reduce", wide * trained, hardware) * (count if stage == 2 else 1)
        gather = ring.seconds("all_gather", size * trained, hardware) if stage else 0.0
        seconds, hidden = reduce + gather, passes
    beside = hardware.overlaps and stage in practice.hides_replica_messages
    return max(0.0, seconds - hidden) if beside else seconds


UPDATE_BYTES = {OptimizerName.adamw: 28, OptimizerName.adafactor: 24}
"""Bytes that an update reads and writes for a weight: fp32 weight, gradient and moments (Adafactor's are factored)."""
GRADIENT_BYTES = 16
"""Bytes for each gradient before: the norm reads it, clipping reads and writes it, and it is set to zero."""


def optimizer_seconds(clock: Clock, parallel: ParallelConfig, optimizer: OptimizerName, trained: float) -> float:
    """The update of a rank's part of the weights, and the cast to the passes' arithmetic."""
    hardware, size = clock.hardware, ITEM_SIZE[clock.precision]
    replicas = clock.dims.replicas if parallel.zero_stage else 1
    own = trained / replicas
    cast = FP32 + size
    if not parallel.offload_optimizer:
        return own * (UPDATE_BYTES[optimizer] + GRADIENT_BYTES + cast) / clock.memory_rate
    host = hardware.host_memory_gb_per_s * 1e9
    across = own * (FP32 + size) / (hardware.host_gb_per_s * 1e9 * hardware.link_efficiency)
    return across + own * (UPDATE_BYTES[optimizer] + GRADIENT_BYTES + cast) / host
