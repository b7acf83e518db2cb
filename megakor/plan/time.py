"""The time of an optimizer step: a layout and a hardware go in, seconds by kind and utilization come out.

What is assumed to run beside what:

- A product takes the time of its arithmetic and then that of moving its operands once.
- Messages of tensor and context ranks are waited for, but for those that a column linear starts in its backward pass:
  they run beside the product named in `Message.beside`. On hardware whose cores communicate too, nothing is hidden.
- Pipeline stages work one forward, one backward (Narayanan et al. 2021, section 2.2.1) and wait for what they send.
- ZeRO-1 and 2 wait for all messages of replicas. ZeRO-3 gathers weights and scatters gradients beside the passes; the
  part that takes longer than the passes is waited for.
- Weights that are kept on the host come with ZeRO-3's gathers. The optimizer's update, its transfers to the host
  included, runs beside nothing.

Sources: Korthikanti et al. 2022 (tensor and sequence parallelism, recomputation), Narayanan et al. 2021 (pipelines),
Chowdhery et al. 2022, appendix B (utilization), Rajbhandari et al. 2020, section 7 (ZeRO's messages).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megakor.config.choices import ActivationCheckpointing, OptimizerName
from megakor.config.schema import ModelConfig, ParallelConfig, TrainConfig
from megakor.model.flops import train_flops_per_token
from megakor.model.specs import EMBEDDING, FINAL_NORM, HEAD, parameter_specs
from megakor.parallel.dims import ParallelDims
from megakor.plan.clock import Clock, Pass, gathered_bytes, optimizer_seconds, replica_seconds, summed_bytes
from megakor.plan.hardware import Hardware, Ring
from megakor.plan.passes import Shape, counts_of, parts_of
from megakor.plan.work import (
    DENSE,
    DOWN,
    MEGAKOR,
    QUERY_KEY_VALUE,
    UP,
    Adapters,
    Practice,
    StageLayers,
)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the stage that takes longest, and the work of all ranks.

    Attributes:
        compute: passes over the micro-batches, recomputation included.
        recompute: of them, recomputation.
        tensor: waiting for messages of tensor ranks.
        context: waiting for messages of context ranks.
        transfers: sending hidden states and their gradients between stages.
        bubble: waiting for the other stages at both ends of a step.
        replicas: waiting for messages of replicas: gradients and weights.
        optimizer: the update.
        model_flops: of the step, on all ranks: forward and backward, by `train_flops_per_token`.
        hardware_flops: the same with recomputation.
        peak: of all ranks together, FLOP/s.
    """

    compute: float
    recompute: float
    tensor: float
    context: float
    transfers: float
    bubble: float
    replicas: float
    optimizer: float
    model_flops: float
    hardware_flops: float
    peak: float

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by kind; they add up to the step."""
        names = ("compute", "tensor", "context", "transfers", "bubble", "replicas", "optimizer")
        return {name: getattr(self, name) for name in names}

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the ranks could do in that time (Chowdhery et al. 2022, appendix B)."""
        return self.model_flops / self.seconds / self.peak

    @property
    def hfu(self) -> float:
        """The same with recomputation."""
        return self.hardware_flops / self.seconds / self.peak


def even_stages(num_layers: int, num_stages: int) -> list[StageLayers]:
    """Blocks dealt out evenly, the embedding first and the output projection last."""
    borders = [num_layers * stage // num_stages for stage in range(num_stages + 1)]
    return [
        StageLayers(range(start, end), embeds=start == 0, projects=end == num_layers)
        for start, end in itertools.pairwise(borders)
    ]


def stage_parameters(model: ModelConfig, layers: StageLayers, tensor: int) -> float:
    """Weights that a rank of a stage holds."""
    one = replace(model, num_hidden_layers=1)
    sizes = {"block": 0.0, EMBEDDING: 0.0, FINAL_NORM: 0.0, HEAD: 0.0}
    for spec in parameter_specs(one):
        place = next((end for end in (EMBEDDING, FINAL_NORM, HEAD) if spec.name.startswith(end)), "block")
        sizes[place] += math.prod(spec.shape) / (1 if spec.shard_dim is None else tensor)
    tied = sizes[EMBEDDING] if model.tie_word_embeddings and not layers.embeds else 0.0
    return (
        sizes["block"] * len(layers.blocks)
        + (sizes[EMBEDDING] if layers.embeds else 0.0)
        + (sizes[FINAL_NORM] + sizes[HEAD] + tied if layers.projects else 0.0)
    )


def adapter_parameters(model: ModelConfig, adapters: Adapters, layers: StageLayers, tensor: int) -> float:
    """Weights of the adapters of a stage that a rank holds: of each, the thin matrix at the side that is not split is
    whole on every tensor rank."""
    hidden, inner = model.hidden_size, model.intermediate_size
    sizes = {
        QUERY_KEY_VALUE: hidden + 3 * hidden / tensor,
        DENSE: hidden / tensor + hidden,
        UP: hidden + inner / tensor,
        DOWN: inner / tensor + hidden,
    }
    return len(layers.blocks) * adapters.rank * sum(sizes[target] for target in adapters.targets)


def flops_per_token(model: ModelConfig, train: TrainConfig, adapters: Adapters | None = None) -> tuple[float, float]:
    """Model FLOPs of a token, and those that recomputation adds.

    `train_flops_per_token`, without the gradients of frozen weights: 4 N + 12·L·H·Q·T + 6 n for n trained by adapters.
    Recomputing a block is its forward pass, 2 N + 4·H·Q·T; `selective` recomputes the second term alone (Korthikanti et
    al. 2022, section 5).
    """
    hidden, length, layers = model.hidden_size, train.sequence_length, model.num_hidden_layers
    attention = 4.0 * hidden * length
    useful = train_flops_per_token(model, length)
    if adapters is not None:
        whole = StageLayers(range(layers), embeds=False, projects=False)
        frozen = useful - 3 * attention * layers
        useful = useful - frozen / 3 + 6 * adapter_parameters(model, adapters, whole, 1)
    kind = train.activation_checkpointing
    if kind is ActivationCheckpointing.none:
        return useful, 0.0
    if kind is ActivationCheckpointing.selective:
        return useful, attention * layers
    block = 2.0 * stage_parameters(model, StageLayers(range(1), embeds=False, projects=False), 1)
    return useful, -(-layers // train.activation_checkpointing_interval) * (block + attention)


def stage_passes(clock: Clock, shape: Shape, train: TrainConfig, stages: Sequence[StageLayers]) -> list[Pass]:
    """One micro-batch on each stage, without what it sends and adds to its gradients."""
    parts = {name: clock.pass_of(work) for name, work in parts_of(shape, train).items()}
    parts["again"] = replace(parts["again"], recompute=parts["again"].compute)
    return [
        sum((parts[name].times(count) for name, count in counts_of(layers, train).items()), Pass()) for layers in stages
    ]


def step_time(
    model: ModelConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    dims: ParallelDims,
    hardware: Hardware,
    stages: Sequence[StageLayers] | None = None,
    optimizer: OptimizerName = OptimizerName.adamw,
    adapters: Adapters | None = None,
    practice: Practice = MEGAKOR,
) -> StepTime:
    """The time of an optimizer step of the global batch size.

    Args:
        model: the architecture, `vocab_size` resolved.
        dims: the layout of the ranks; `hardware.per_node` of them share a node.
        stages: what each pipeline stage holds; None: blocks are dealt out evenly.
        adapters: what is trained; None: all weights.
        practice: of the system that runs it.
    """
    if stages is None:
        stages = even_stages(model.num_hidden_layers, dims.pipeline)
    assert len(stages) == dims.pipeline
    count = dims.num_micro_batches(train)
    size = train.precision.itemsize
    clock = Clock(hardware, train.precision, dims)
    shape = Shape(model, parallel, train.micro_batch_size, train.sequence_length, size, adapters, practice)
    held = [stage_parameters(model, layers, dims.tensor) for layers in stages]
    trained = held
    if adapters is not None:
        trained = [adapter_parameters(model, adapters, layers, dims.tensor) for layers in stages]
    border = shape.stream / dims.tensor if practice.sends_parts else shape.residual
    sent = practice.virtual_stages * 2 * border if dims.pipeline > 1 else 0.0
    neighbours = Ring(2, 2 if dims.world_size <= hardware.per_node else 1)
    transfers = neighbours.seconds("send", sent, hardware) if sent else 0.0
    summed = summed_bytes(parallel, train.precision, practice, dims.replicas)
    gathered = gathered_bytes(parallel, train.precision, practice) if dims.replicas > 1 else 0.0
    passes = [
        one + Pass(compute=(numel * summed + weights * gathered) / clock.memory_rate, transfers=transfers)
        for one, weights, numel in zip(stage_passes(clock, shape, train, stages), held, trained, strict=True)
    ]
    worst = max(passes, key=lambda one: one.seconds)
    bubble = (sum(one.seconds for one in passes) - worst.seconds) / practice.virtual_stages
    replicas = max(
        replica_seconds(clock, parallel, practice, numel, weights, one.compute, count)
        for one, weights, numel in zip(passes, held, trained, strict=True)
    )
    tokens = train.global_batch_size * train.sequence_length
    useful, again = flops_per_token(model, train, adapters)
    return StepTime(
        compute=count * worst.compute,
        recompute=count * worst.recompute,
        tensor=count * worst.tensor,
        context=count * worst.context,
        transfers=count * worst.transfers,
        bubble=bubble,
        replicas=replicas,
        optimizer=optimizer_seconds(clock, parallel, optimizer, max(trained)),
        model_flops=useful * tokens,
        hardware_flops=(useful + again) * tokens,
        peak=hardware.peak(train.precision) * dims.world_size,
    )
