"""What ranks say to each other in a step, bytes that a rank puts in: `megakor simulate` counts it, a plan adds it up.

What replicas say is by formula (Rajbhandari et al. 2020, section 7). Up to ZeRO-2 it is as DeepSpeed 0.19 does it:
gradients are summed by all-reduce, once a step or, by ZeRO-2, for every micro-batch; updated weights are gathered once
a step. ZeRO-3's is the paper's: weights are gathered in every forward and backward pass, gradients are scattered in
every backward pass. Gradients travel in the type of the weights, but in fp32 under ZeRO-1 in bf16.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from megakor.config.schema import EngineConfig, ModelConfig, Precision
from megakor.parallel.dims import ParallelDims
from megakor.plan.partition import Stage
from megakor.plan.passes import Shape, counts_of, parts_of
from megakor.plan.work import FP32, Adapters


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind among the ranks of one axis.

    Attributes:
        count: how many; None where DeepSpeed cuts one amount into buckets of its own.
        num_bytes: of the tensors that a rank puts in, all together: the whole tensor of an all-reduce, a
            reduce-scatter or an all-to-all, the rank's own part of an all-gather.
    """

    axis: str
    kind: str
    count: int | None
    num_bytes: int

    def times(self, number: int) -> Traffic:
        count = None if self.count is None else self.count * number
        return replace(self, count=count, num_bytes=self.num_bytes * number)


def replica_traffic(
    config: EngineConfig, dims: ParallelDims, numel: int, num_micro_batches: int, trained: int | None = None
) -> list[Traffic]:
    """Collectives among the replicas of a rank in one step, without counts: DeepSpeed cuts them into its own buckets.

    Scalars (loss, norm, overflow) are left out, and so is the padding of what is cut.

    Args:
        numel: parameters of the rank.
        trained: of them, those that have gradients; None: all.
    """
    if dims.replicas == 1:
        return []
    trained = numel if trained is None else trained
    item, stage = config.train.precision.itemsize, config.parallel.zero_stage
    part, updated = numel * item // dims.replicas, trained * item // dims.replicas
    gathered = {0: 0, 1: updated, 2: updated, 3: 2 * part * num_micro_batches}[stage]
    wide = stage == 1 and config.train.precision is Precision.bf16
    reduced = trained * FP32 if wide else trained * item * (num_micro_batches if stage >= 2 else 1)
    found = [
        Traffic("replicas", "all_gather", None, gathered),
        Traffic("replicas", "reduce_scatter" if stage == 3 else "all_reduce", None, reduced),
    ]
    return [traffic for traffic in found if traffic.num_bytes]


def stage_traffic(
    config: EngineConfig,
    model: ModelConfig,
    dims: ParallelDims,
    stage: Stage,
    adapters: Adapters | None = None,
    trained: int | None = None,
) -> list[Traffic]:
    """What a rank of a stage puts into collectives and sends in a step.

    Args:
        trained: parameters of the rank that have gradients; None: all.
    """
    count, train, layers = dims.num_micro_batches(config.train), config.train, stage.held
    numel = stage.parameters + (trained or 0)
    shape = Shape(
        model, config.parallel, train.micro_batch_size, train.sequence_length, train.precision.itemsize, adapters
    )
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    parts = parts_of(shape, train)
    for name, times in counts_of(layers, train).items():
        for message in parts[name].messages:
            place = message.axis, message.kind
            among = getattr(dims, message.axis) if message.kind == "all_gather" else 1
            counts[place] += times * count
            sizes[place] += round(message.num_bytes) // among * times * count
    found = [Traffic(*place, counts[place], sizes[place]) for place in sorted(counts) if counts[place]]
    if stage.number < dims.pipeline - 1:
        found.append(Traffic("pipeline", "send_hidden_states", count, round(shape.residual) * count))
    if stage.number > 0:
        found.append(Traffic("pipeline", "send_gradients", count, round(shape.residual) * count))
    if model.tie_word_embeddings and dims.pipeline > 1 and (layers.embeds or layers.projects) and adapters is None:
        assert model.vocab_size is not None
        found.append(
            Traffic("tied stages", "all_reduce", 1, FP32 * model.vocab_size // dims.tensor * model.hidden_size)
        )
    return found + replica_traffic(config, dims, numel, count, trained)
