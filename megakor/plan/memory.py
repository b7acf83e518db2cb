"""The memory of a pipeline stage's rank: layout and layers go in, bytes at its fullest moment come out.

What stays from step to step is weights, gradients and optimizer, by ZeRO stage (Rajbhandari et al. 2020, section 5), as
DeepSpeed 0.19 holds them under `megakor.train.settings`. What comes and goes is looked at in the moments that can be
the fullest: a backward pass with all activations, later ones in which gradients pile up, and the update.
`tests.benchmarks.memory` compares these formulas with processes that train. Adafactor's factored moments are small and
left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from megakor.config.schema import EngineConfig, ModelConfig, OptimizerName, Precision
from megakor.parallel.chunks import ACCELERATOR_LOSS_CHUNK, HOST_LOSS_CHUNK
from megakor.parallel.dims import ParallelDims
from megakor.plan.activations import Activations, activations
from megakor.plan.partition import Stage
from megakor.plan.time import adapter_parameters
from megakor.plan.work import FP32, Adapters

GIB = 2**30
BUCKET = 500_000_000
"""Gradients that DeepSpeed's ZeRO-2 and 3 gather before they reduce them, `reduce_bucket_size`."""
HOST_BUCKET = 2**22
"""The same on CPUs, as `megakor.train.settings` sets it."""
LIVE = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered at once, `stage3_max_live_parameters`."""
LIBRARIES = 1.5 * GIB
"""Assumed of CUDA's context, NCCL's buffers and cuBLAS's workspace together."""
GAPS = 0.05
"""Assumed share of what comes and goes that the allocator cannot use."""


@dataclass(frozen=True)
class StageMemory:
    """A rank of one pipeline stage; bytes at its fullest moment.

    Attributes:
        holds: its layers, in words.
        parameters: elements of its weights.
        in_flight: micro-batches whose activations it keeps at once, min(micro-batches, stages - stage): 1F1B (Narayanan
            et al. 2021, section 2.2).
        moment: which one is the fullest.
        gradients: what accumulates them, and those on their way there.
        optimizer: fp32 masters and moments.
        logits: with the loss and the gradients of both.
        buffers: of pipeline neighbours, and DeepSpeed's buckets and gathered weights.
        margin: libraries, and gaps in the allocator's blocks; assumed.
    """

    stage: int
    holds: str
    parameters: int
    in_flight: int
    moment: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    margin: int

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by kind."""
        names = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "margin")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Moment:
    """What is there besides weights, masters and moments."""

    gradients: float
    activations: float = 0.0
    logits: float = 0.0
    buffers: float = 0.0

    @property
    def total(self) -> float:
        return self.gradients + self.activations + self.logits + self.buffers


def state_bytes(
    config: EngineConfig, dims: ParallelDims, numel: int, trained: int | None = None
) -> tuple[int, int, int]:
    """Bytes of a rank's weights, fp32 gradients and optimizer: fp32 masters and Adam's moments.

    Adafactor's factored moments are left out; what is offloaded takes no memory of the device.

    Args:
        numel: parameters of the rank.
        trained: of them, those that have gradients; None: all.
    """
    parallel, stage = config.parallel, config.parallel.zero_stage
    masters = FP32 if stage else 0
    moments = 2 * FP32 if config.optimizer.name is OptimizerName.adamw else 0
    trained = numel if trained is None else trained

    def cut(count: int, size: int, from_stage: int, offloaded: bool = False) -> int:
        """Bytes of something that ZeRO cuts from a stage on, `size` for each of `count` parameters."""
        return 0 if offloaded else count * size // (dims.replicas if stage >= from_stage else 1)

    return (
        cut(numel, config.train.precision.itemsize, 3, parallel.offload_parameters),
        cut(trained, FP32, 2),
        cut(trained, masters + moments, 1, parallel.offload_optimizer),
    )


def moments(
    config: EngineConfig,
    dims: ParallelDims,
    micro_batch: Activations,
    in_flight: int,
    numel: int,
    trained: int,
    largest: int,
    on_host: bool,
) -> dict[str, Moment]:
    """The moments that can be the fullest, by name.

    building: the largest tensor is made whole, in fp32, and the rank's shard of it copied.
    backward: the backward pass of a full stage begins. There is the sum of the gradients so far, in fp32; of the first
        gradient, its copy in fp32 under ZeRO-1; under ZeRO-3, gathered weights.
    part: in ZeRO-2, the last rank has the gradients of its part, those of the last layers: the sum from the
        micro-batches before, and those of this one, not yet added. The other layers' activations are still there.
    embedding: that backward pass ends with the embedding's gradient and the first rank's part.
    update: fp32 gradients of the rank's part are copied into one tensor for the optimizer; those of ZeRO-1 in bf16, and
        of ZeRO-2, lie in one already.
    gathering: updated weights are gathered at once, which gloo does into a copy.

    Args:
        micro_batch: activations of one.
        in_flight: micro-batches whose activations are kept at once.
        numel: parameters of the rank.
        trained: of them, those that have gradients.
        largest: those of the largest tensor, as the rank holds it.
        on_host: whether ranks compute on CPUs, with gloo between them.
    """
    stage, item = config.parallel.zero_stage, config.train.precision.itemsize
    wide, own = item == FP32, trained // dims.replicas
    _, summed, _ = state_bytes(config, dims, numel, trained)
    zero = config.deepspeed.get("zero_optimization", {})
    gathered = item * max(largest, min(numel, int(zero.get("stage3_max_live_parameters", LIVE)))) if stage == 3 else 0
    staged = stage >= 2 or (
        stage == 1 and config.train.precision is not Precision.bf16
    )  # by DeepSpeed's ZeRO optimizers
    bucket = 0
    if staged and not on_host:
        bucket = int(zero.get("reduce_bucket_size", BUCKET)) * (FP32 if stage == 1 else item)
    copied = FP32 * largest if stage == 1 and not wide else 0
    working = micro_batch.peak - micro_batch.logits - micro_batch.buffers
    update = {0: summed, 1: 2 * FP32 * own if wide else summed, 2: (2 if wide else 1) * FP32 * own, 3: 2 * FP32 * own}
    found = {
        "backward": Moment(
            summed + copied,
            (in_flight - 1) * micro_batch.kept + working,
            micro_batch.logits,
            micro_batch.buffers + gathered + bucket,
        ),
        "update": Moment(update[stage], buffers=bucket),
    }
    if stage == 2:
        both = (FP32 + item) * own
        found["part"] = Moment(both, micro_batch.kept * (1 - 1 / dims.replicas), buffers=bucket)
        found["embedding"] = Moment(both + (0 if wide else (FP32 + item) * largest), buffers=bucket)
    if on_host:
        between = 0 if stage == 2 or (wide and stage == 1) else summed
        found["building"] = Moment(between, buffers=FP32 * (largest * dims.tensor + largest))
        if stage < 3 and dims.replicas > 1:
            found["gathering"] = Moment(between, buffers=item * trained)
    return found


def stage_memory(
    config: EngineConfig,
    model: ModelConfig,
    dims: ParallelDims,
    stage: Stage,
    adapters: Adapters | None = None,
    on_host: bool = False,
    libraries: float = LIBRARIES,
) -> StageMemory:
    """The memory of a rank of a stage.

    Args:
        adapters: what is trained; None: all weights.
        on_host: whether ranks compute on CPUs, with gloo between them.
        libraries: bytes of what is no tensor.
    """
    micro_batch = activations(
        config, model, dims, stage, adapters, HOST_LOSS_CHUNK if on_host else ACCELERATOR_LOSS_CHUNK
    )
    in_flight = min(dims.num_micro_batches(config.train), dims.pipeline - stage.number)
    numel, trained, largest = stage.parameters, stage.parameters, stage.largest
    if adapters is not None:
        trained = round(adapter_parameters(model, adapters, stage.held, dims.tensor))
        largest, numel = trained, numel + trained
    weights, _, optimizer = state_bytes(config, dims, numel, trained)
    found = moments(config, dims, micro_batch, in_flight, numel, trained, largest, on_host)
    name = max(found, key=lambda name: found[name].total)
    moment = found[name]
    return StageMemory(
        stage=stage.number,
        holds=stage.holds,
        parameters=numel,
        in_flight=in_flight,
        moment=name,
        weights=weights,
        gradients=round(moment.gradients),
        optimizer=optimizer,
        activations=round(moment.activations),
        logits=round(moment.logits),
        buffers=round(moment.buffers),
        margin=round(libraries + (0 if on_host else GAPS * moment.total)),
    )
