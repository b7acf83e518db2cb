"""How long a hardware takes: amounts of work go in, seconds come out."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from megakor.config.choices import OptimizerName, Precision
from megakor.config.schema import ParallelConfig
from megakor.parallel.dims import ParallelDims
from megakor.plan.hardware import Hardware, Ring
from megakor.plan.work import FP32, Message, Practice, Product, Work


@dataclass(frozen=True)
class Pass:
    """Seconds of a micro-batch, by kind as in `megakor.plan.time.StepTime`."""

    compute: float = 0.0
    recompute: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    transfers: float = 0.0

    def __add__(self, other: Pass) -> Pass:
        return Pass(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def times(self, number: float) -> Pass:
        return Pass(*(number * seconds for seconds in astuple(self)))

    @property
    def seconds(self) -> float:
        return self.compute + self.tensor + self.context + self.transfers


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

    @property
    def host_rate(self) -> float:
        """Bytes a second between the device and the host's memory."""
        return self.hardware.host_gb_per_s * 1e9 * self.hardware.link_efficiency

    def product(self, product: Product) -> float:
        """Seconds of a matrix product."""
        return product.flops / self.rate + product.num_bytes(self.precision.itemsize) / self.memory_rate

    def pass_of(self, work: Work) -> Pass:
        """Seconds of work."""
        products = sum(map(self.product, work.products))
        attention = work.attention / (self.hardware.peak(self.precision) * self.hardware.attention_efficiency)
        waited = {"tensor": 0.0, "context": 0.0}
        for message in work.messages:
            waited[message.axis] += self.message(message)
        return Pass(compute=products + attention + work.streamed / self.memory_rate, **waited)

    def ring(self, axis: str) -> Ring:
        """The ranks of an axis: tensor, context or replicas."""
        dims, per_node = self.dims, self.hardware.per_node
        sizes = {"tensor": (dims.tensor, 1), "context": (dims.context, dims.tensor)}
        return Ring.of(*sizes.get(axis, (dims.replicas, dims.tensor)), per_node)

    def message(self, message: Message) -> float:
        """Seconds of waiting for a collective."""
        seconds = self.ring(message.axis).seconds(message.kind, message.num_bytes, self.hardware)
        if message.beside is None or not self.hardware.overlaps:
            return seconds
        return max(0.0, seconds - self.product(message.beside))


def replica_seconds(
    clock: Clock, parallel: ParallelConfig, practice: Practice, trained: float, held: float, passes: float, count: int
) -> float:
    """Waiting for replicas in a step: gradients are summed and weights gathered as `megakor.plan.traffic` says.

    Args:
        trained: weights of a rank that have gradients; of `held`.
        passes: seconds of a micro-batch's passes, which messages that are hidden run beside.
        count: micro-batches.
    """
    ring, hardware = clock.ring("replicas"), clock.hardware
    size, stage = clock.precision.itemsize, parallel.zero_stage
    wide = FP32 if practice.wide_gradients or (stage == 1 and clock.precision is Precision.bf16) else size
    if stage == 3:
        gather = ring.seconds("all_gather", size * held, hardware)
        scatter = ring.seconds("reduce_scatter", wide * trained, hardware)
        fetch = size * held / ring.size / clock.host_rate if parallel.offload_parameters else 0.0
        seconds, hidden = count * (2 * (gather + fetch) + scatter), count * passes
    else:
        reduce = ring.seconds("all_reduce", wide * trained, hardware) * (count if stage == 2 else 1)
        gather = ring.seconds("all_gather", size * trained, hardware) if stage else 0.0
        seconds, hidden = reduce + gather, (count if stage == 2 else 1) * passes
    beside = hardware.overlaps and stage in practice.hides_replica_messages
    return max(0.0, seconds - hidden) if beside else seconds


def summed_bytes(parallel: ParallelConfig, precision: Precision, practice: Practice, replicas: int) -> float:
    """Bytes that stream through memory for a weight's gradient of a micro-batch, until it is in its fp32 sum.

    In one pass the gradient is read, and its sum read and written. DeepSpeed 0.19 casts in a pass of its own
    (bf16_optimizer.py, _update_hp_grad). Under ZeRO-2 and 3 it copies gradients into a bucket, divides them, and puts
    them in another order for the message; a rank casts and adds what it owns (stage_1_and_2.py, average_tensor;
    coalesced_collectives.py, reduce_scatter_coalesced).
    """
    size = precision.itemsize
    in_one_pass, cast_and_added = size + 2 * FP32, size + 4 * FP32
    if not practice.copies:
        return in_one_pass
    if parallel.zero_stage >= 2:
        return 6 * size + cast_and_added / replicas
    return cast_and_added if precision is Precision.bf16 else in_one_pass


def gathered_bytes(parallel: ParallelConfig, precision: Precision, practice: Practice) -> float:
    """Bytes that stream through memory for a weight that a micro-batch's two passes gather, besides the messages.

    DeepSpeed 0.19 joins the replicas' parts of each weight to a new tensor (partition_parameters.py,
    AllGatherCoalescedHandle.wait).
    """
    return 2 * 2 * precision.itemsize if parallel.zero_stage == 3 and practice.copies else 0.0


UPDATE_BYTES = {OptimizerName.adamw: 28, OptimizerName.adafactor: 24}
"""Bytes that an update reads and writes for a weight: fp32 weight, gradient and moments (Adafactor's are factored)."""
GRADIENT_BYTES = 12
"""Bytes for each gradient before: the norm reads it, clipping reads and writes it."""


def optimizer_seconds(clock: Clock, parallel: ParallelConfig, optimizer: OptimizerName, trained: float) -> float:
    """The update of a rank's part of the weights, the cast to the passes' arithmetic, and clearing the gradients."""
    hardware, size = clock.hardware, clock.precision.itemsize
    own = trained / (clock.dims.replicas if parallel.zero_stage else 1)
    updated = own * (UPDATE_BYTES[optimizer] + GRADIENT_BYTES + FP32 + size)
    cleared = FP32 * (own if parallel.zero_stage > 1 else trained) / clock.memory_rate
    if not parallel.offload_optimizer:
        return cleared + updated / clock.memory_rate
    across = own * (FP32 + size) / clock.host_rate
    return cleared + across + updated / (hardware.host_memory_gb_per_s * 1e9)
