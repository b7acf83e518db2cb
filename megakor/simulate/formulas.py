"""What ZeRO adds to a rank, by formula: its replicas' collectives in a step, and the bytes of weights and optimizer.

Rajbhandari et al. 2020, sections 5 (model states) and 7 (communication). Up to ZeRO-2 the communication is as DeepSpeed
0.19 does it: gradients are summed by all-reduce, once a step or, by ZeRO-2, for every micro-batch; updated weights are
gathered once a step. ZeRO-3's is the paper's: weights are gathered in every forward and backward pass, gradients are
scattered in every backward pass. Gradients travel in the type of the weights, but in fp32 under ZeRO-1 in bf16.
"""

from __future__ import annotations

from megakor.config.schema import EngineConfig, OptimizerName, Precision
from megakor.parallel.dims import ParallelDims
from megakor.simulate.collectives import Traffic
from megakor.train.device import DTYPES

FP32 = 4  # bytes


def replica_traffic(config: EngineConfig, dims: ParallelDims, numel: int, num_micro_batches: int) -> list[Traffic]:
    """Collectives among the replicas of a rank in one step, without counts: DeepSpeed cuts them into its own buckets.

    Scalars (loss, norm, overflow) are left out, and so is the padding of what is cut.

    Args:
        numel: parameters of the rank.
    """
    if dims.replicas == 1:
        return []
    weights = numel * DTYPES[config.train.precision].itemsize
    part, stage = weights // dims.replicas, config.parallel.zero_stage
    gathered = {0: 0, 1: part, 2: part, 3: 2 * part * num_micro_batches}[stage]
    wide = stage == 1 and config.train.precision is Precision.bf16
    reduced = numel * FP32 if wide else weights * (num_micro_batches if stage >= 2 else 1)
    found = [
        Traffic("replicas", "all_gather", None, gathered),
        Traffic("replicas", "reduce_scatter" if stage == 3 else "all_reduce", None, reduced),
    ]
    return [traffic for traffic in found if traffic.num_bytes]


def state_bytes(config: EngineConfig, dims: ParallelDims, numel: int) -> tuple[int, int, int]:
    """Bytes of a rank's weights, fp32 gradients and optimizer: fp32 masters and Adam's moments.

    Adafactor's factored moments are small and left out; what is offloaded takes no memory of the device.
    """
    parallel, stage = config.parallel, config.parallel.zero_stage
    masters = FP32 if stage else 0
    moments = 2 * FP32 if config.optimizer.name is OptimizerName.adamw else 0

    def cut(size: int, from_stage: int, offloaded: bool = False) -> int:
        """Bytes of something that ZeRO cuts from a stage on, `size` for each parameter."""
        return 0 if offloaded else numel * size // (dims.replicas if stage >= from_stage else 1)

    return (
        cut(DTYPES[config.train.precision].itemsize, 3, parallel.offload_parameters),
        cut(FP32, 2),
        cut(masters + moments, 1, parallel.offload_optimizer),
    )
