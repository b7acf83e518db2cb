"""What ranks say to each other in a step, bytes that a rank puts in: `megakor simulate` counts it, a plan adds it up.

What replicas say is by formula (Rajbhandari et al. 2020, section 7). Up to ZeRO-2 it is as DeepSpeed 0.19 does it:
gradients are summed by all-reduce, once a step or, by ZeRO-2, for every micro-batch; updated weights are gathered once
a step. ZeRO-3's is the paper's: weights are gathered in every forward and backward pass, gradients are scattered in
every backward pass. Gradients travel in the type of the weights, but in fp32 under ZeRO-1 in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megakor.config.schema import EngineConfig, Precision
from megakor.parallel.dims import ParallelDims

FP32 = 4  # bytes


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


def replica_traffic(config: EngineConfig, dims: ParallelDims, numel: int, num_micro_batches: int) -> list[Traffic]:
    """Collectives among the replicas of a rank in one step, without counts: DeepSpeed cuts them into its own buckets.

    Scalars (loss, norm, overflow) are left out, and so is the padding of what is cut.

    Args:
        numel: parameters of the rank.
    """
    if dims.replicas == 1:
        return []
    weights = numel * config.train.precision.itemsize
    part, stage = weights // dims.replicas, config.parallel.zero_stage
    gathered = {0: 0, 1: part, 2: part, 3: 2 * part * num_micro_batches}[stage]
    wide = stage == 1 and config.train.precision is Precision.bf16
    reduced = numel * FP32 if wide else weights * (num_micro_batches if stage >= 2 else 1)
    found = [
        Traffic("replicas", "all_gather", None, gathered),
        Traffic("replicas", "reduce_scatter" if stage == 3 else "all_reduce", None, reduced),
    ]
    return [traffic for traffic in found if traffic.num_bytes]
