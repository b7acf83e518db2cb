"""What ZeRO leaves a rank to hold: parameters go in, bytes of weights, gradients and optimizer come out."""

from __future__ import annotations

from megakor.config.schema import EngineConfig, OptimizerName
from megakor.parallel.dims import ParallelDims

FP32 = 4  # bytes


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
        cut(config.train.precision.itemsize, 3, parallel.offload_parameters),
        cut(FP32, 2),
        cut(masters + moments, 1, parallel.offload_optimizer),
    )
