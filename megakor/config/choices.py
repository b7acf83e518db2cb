"""What keys with a few values may be."""

from __future__ import annotations

from enum import Enum


class Precision(Enum):
    """Arithmetic of the forward and backward pass. Master weights and moments are fp32 in all of them."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class ActivationCheckpointing(Enum):
    """What the backward pass computes again instead of keeping it."""

    none = "none"
    full = "full"
    selective = "selective"


class OptimizerName(Enum):
    adamw = "adamw"
    adafactor = "adafactor"


class ScheduleName(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


class WandbMode(Enum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


class OnError(Enum):
    """What to do with a record that cannot be read: stop with one error, or skip it and count it."""

    stop = "stop"
    skip = "skip"


class LoraTarget(Enum):
    """Linears of a block that adapters may go with."""

    query_key_value = "query_key_value"
    dense = "dense"
    dense_h_to_4h = "dense_h_to_4h"
    dense_4h_to_h = "dense_4h_to_h"


class TokenizerKind(Enum):
    bpe = "bpe"
    unigram = "unigram"


class OnSpike(Enum):
    """What to do about a loss spike: nothing, tell, or go back to a checkpoint before it and leave its data out."""

    off = "off"
    warn = "warn"
    act = "act"


class ClusterKind(Enum):
    """What starts a run's processes on its machines."""

    local = "local"
    deepspeed = "deepspeed"
    torchrun = "torchrun"
    openmpi = "openmpi"
    slurm = "slurm"
    kubernetes = "kubernetes"


class NodeLauncher(Enum):
    """What a node's one task starts its ranks with."""

    torchrun = "torchrun"
    deepspeed = "deepspeed"


class JobKind(Enum):
    """Kubernetes' kinds of a job of several pods."""

    jobset = "jobset"
    pytorchjob = "pytorchjob"
