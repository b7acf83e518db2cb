"""What DeepSpeed is told: the pass-through section, and over it the keys that megakor owns."""

from __future__ import annotations

from typing import Any

from megakor.config.schema import EngineConfig, Precision
from megakor.parallel.dims import ParallelDims
from megakor.train.device import HOST, is_cpu


def deepspeed_config(config: EngineConfig, dims: ParallelDims) -> dict[str, Any]:
    """DeepSpeed's configuration: the pass-through section, and over it the keys that megakor owns."""
    train = config.train
    zero: dict[str, Any] = {**config.deepspeed.get("zero_optimization", {}), "stage": config.parallel.zero_stage}
    if is_cpu():
        zero.setdefault("contiguous_gradients", False)  # a copy of every gradient, against fragmented GPU memory
        zero.setdefault("reduce_bucket_size", 2**22)  # gradients are copied into a bucket, which the cache should hold
    zero.setdefault("memory_efficient_linear", False)  # it would replace torch's linear for the whole process
    if config.parallel.offload_optimizer:
        zero.setdefault("offload_optimizer", {"device": HOST})
    if config.parallel.offload_parameters:
        zero.setdefault("offload_param", {"device": HOST})
    # ZeRO-1 sums bf16 gradients of micro-batches in fp32; DeepSpeed would sum those of replicas in bf16.
    micro_batches = dims.num_micro_batches(config.train)
    accumulated = train.precision is Precision.bf16 and config.parallel.zero_stage == 1
    communication = {"communication_data_type": "fp32"} if accumulated else {}
    return {
        "steps_per_print": 1_000_000_000,
        "zero_allow_untested_optimizer": True,  # Adafactor is ours, and knows its fragments
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW updates offloaded weights as fast, uncompiled
        **communication,
        **config.deepspeed,
        # DeepSpeed counts the ranks that split a sequence as replicas, which they are for parameters.
        "train_batch_size": train.micro_batch_size * micro_batches * dims.replicas,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": train.clip_grad_norm if config.parallel.zero_stage else 0.0,  # ZeRO-0: by train_step
        # ZeRO-2 looks for gradients that are not finite in bf16 only when told to; elsewhere the norm tells.
        "bf16": {
            "enabled": train.precision is Precision.bf16,
            "immediate_grad_update": True,
            "check_grad_overflow": True,
        },
        "fp16": {"enabled": train.precision is Precision.fp16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        # Its cuts would corrupt activations that are split along the sequence already.
        "pipeline": {**config.deepspeed.get("pipeline", {}), "pipe_partitioned": False, "grad_partitioned": False},
    }
