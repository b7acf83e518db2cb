"""Values of GPT-NeoX's configuration in our units and words, for the keys that `neox_keys.yaml` lists as changed.

A function gets all of GPT-NeoX's values by their dotted keys, defaults included, and returns ours by our dotted keys.
Several keys may share one, such as the batch sizes. It raises `ValueError` with the rule, `must …`, that a value
breaks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Values = Mapping[str, Any]
"""GPT-NeoX's values by dotted key; `global_num_gpus` is there where the number of GPUs is known."""

PRECISIONS = {"fp16": "fp16", "fp32": "fp32", "bfloat16": "bf16"}
WHOLE_ATTENTION = {"global", "flash"}
LAUNCHERS = {"pdsh": "deepspeed", "openmpi": "openmpi", "slurm": "slurm"}


def number(neox: Values, key: str) -> float:
    """A value that must be a number. YAML takes 1e-5, without a point, for text, which is read as the number."""
    try:
        return float(neox[key])
    except (TypeError, ValueError):
        raise ValueError(f"must come with a number as {key}, not {neox[key]!r}") from None


def count(neox: Values, key: str) -> int:
    """A value that must be a whole number."""
    value = number(neox, key)
    if value != int(value):
        raise ValueError(f"must come with a whole number as {key}, not {neox[key]!r}")
    return int(value)


def flag(neox: Values, key: str) -> bool:
    """A value that must be true or false; false where there is none."""
    value = neox.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"must come with true or false as {key}, not {value!r}")
    return value


def choice(neox: Values, key: str, legal: Mapping[str, str]) -> str:
    """Our word for one of GPT-NeoX's, which it compares without regard to case."""
    word = str(neox[key]).lower()
    if word not in legal:
        raise ValueError(f"must be one of {', '.join(legal)}")
    return legal[word]


def rounded(value: float) -> float:
    """Without the digits that only rounding errors fill."""
    return float(f"{value:.10g}")


# ------------------------------------------------------------------------------------------------- architecture


def intermediate_size(neox: Values) -> dict[str, Any]:
    """As `ParallelMLP` of megatron/model/transformer.py works it out for layers that are not gated."""
    given = [key for key in ("intermediate_size", "expansion_factor") if neox.get(key)]
    if len(given) > 1:
        raise ValueError("must be one of intermediate_size and expansion_factor")
    if neox.get("intermediate_size"):
        size = count(neox, "intermediate_size")
    elif neox.get("expansion_factor"):
        size = int(number(neox, "expansion_factor") * count(neox, "hidden_size"))
    else:
        size = 4 * count(neox, "hidden_size")
    multiple = 2 * count(neox, "mlp_multiple_of") if "mlp_multiple_of" in neox else 1
    return {"model.intermediate_size": -(-size // multiple) * multiple}


def initializer_range(neox: Values) -> dict[str, Any]:
    """The standard deviation of megatron/model/init_functions.py."""
    hidden, layers = count(neox, "hidden_size"), count(neox, "num_layers")
    std = number(neox, "init_method_std") if "init_method_std" in neox else 0.02
    spreads = {
        "normal": std,
        "scaled_normal": std / math.sqrt(2 * layers),
        "single_residual_scaled_normal": std / math.sqrt(layers),
        "small_init": math.sqrt(2 / (5 * hidden)),
        "wang_init": 2 / layers / math.sqrt(hidden),
    }
    method = choice(neox, "init_method", {name: name for name in spreads})
    return {"model.initializer_range": rounded(spreads[method])}


def key_value_heads(neox: Values) -> dict[str, Any]:
    heads = neox["num_attention_heads"]
    if neox["num_kv_heads"] != heads:
        raise ValueError(f"must be num_attention_heads={heads}: every head has keys and values of its own")
    return {}


def attention(neox: Values) -> dict[str, Any]:
    """Refuse all but attention over whole sequences, in both forms: a kind for each layer, or repeated patterns."""
    config = neox["attention_config"]
    rule = f"must name {' or '.join(sorted(WHOLE_ATTENTION))} only: attention is over the whole sequence in every layer"
    try:
        kinds = {kind for item in config for kind in ([item] if isinstance(item, str) else item[0])}
    except (TypeError, IndexError, KeyError):
        raise ValueError(rule) from None
    if not kinds <= WHOLE_ATTENTION:
        raise ValueError(rule)
    return {}


# ----------------------------------------------------------------------------------------------------- training


def batch_sizes(neox: Values) -> dict[str, Any]:
    """As `calculate_batch_parameters` of megatron/neox_arguments/arguments.py, whose accumulation defaults to 1."""
    whole, micro = neox.get("train_batch_size"), neox.get("train_micro_batch_size_per_gpu")
    if whole is None and micro is None:
        raise ValueError("must come with train_batch_size or train_micro_batch_size_per_gpu")
    accumulated = count(neox, "gradient_accumulation_steps") if "gradient_accumulation_steps" in neox else 1
    if whole is not None and micro is not None and "global_num_gpus" not in neox:
        sizes = count(neox, "train_batch_size"), count(neox, "train_micro_batch_size_per_gpu")
    elif whole is not None:
        replicas = num_replicas(neox)
        size = count(neox, "train_batch_size")
        one = size // (replicas * accumulated) if micro is None else count(neox, "train_micro_batch_size_per_gpu")
        if size != one * accumulated * replicas or not size:
            sides = "train_micro_batch_size_per_gpu × gradient_accumulation_steps × replicas"
            raise ValueError(f"must make train_batch_size={size} of {sides}: {one} × {accumulated} × {replicas}")
        sizes = size, one
    else:
        one = count(neox, "train_micro_batch_size_per_gpu")
        sizes = one * accumulated * num_replicas(neox), one
    return {"train.global_batch_size": sizes[0], "train.micro_batch_size": sizes[1]}


def num_replicas(neox: Values) -> int:
    """GPUs over tensor ranks and stages."""
    if "global_num_gpus" not in neox:
        raise ValueError("must come with the number of GPUs, which GPT-NeoX counts at a start: world_size=")
    ranks = layout_size(neox, "model_parallel_size") * layout_size(neox, "pipe_parallel_size")
    gpus = count(neox, "global_num_gpus")
    if gpus % ranks or gpus < 1:
        raise ValueError(f"must come with a number of GPUs that the {ranks} ranks of a replica divide, not {gpus}")
    return gpus // ranks


def precision(neox: Values) -> dict[str, Any]:
    found = {ours for ours in ("fp16", "bf16") if flag(neox, f"{ours}.enabled")}
    if neox.get("precision") is not None:
        found.add(choice(neox, "precision", PRECISIONS))
    if len(found) > 1:
        raise ValueError(f"must agree with precision, fp16 and bf16, which ask for {' and '.join(sorted(found))}")
    return {"train.precision": next(iter(found), "fp32")}


def betas(neox: Values) -> dict[str, Any]:
    value = neox["optimizer.params.betas"]
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError("must be two numbers")
    return {"optimizer.beta1": value[0], "optimizer.beta2": value[1]}


def decay_steps(neox: Values) -> int:
    """Steps that the learning rate is a function of; as `get_learning_rate_scheduler` of megatron/training.py."""
    steps = count(neox, "train_iters")
    if neox.get("lr_decay_iters") is not None:
        return count(neox, "lr_decay_iters")
    if neox.get("lr_decay_fraction") is not None:
        return math.floor(steps * number(neox, "lr_decay_fraction"))
    return steps


def whole_decay(neox: Values) -> dict[str, Any]:
    """Refuse a rate that stops falling before the run ends, or would go on."""
    steps = count(neox, "train_iters")
    if str(neox["lr_decay_style"]).lower() != "constant" and decay_steps(neox) != steps:
        raise ValueError(f"must lead to train_iters={steps}, not {decay_steps(neox)}: a schedule ends with its run")
    return {}


def zero_stage(neox: Values) -> dict[str, Any]:
    return {"parallel.zero_stage": max(1, count(neox, "zero_optimization.stage"))}


def checkpoint_interval(neox: Values) -> dict[str, Any]:
    """Nothing where GPT-NeoX's factor multiplies, or where a run saves at the end alone."""
    if neox.get("checkpoint_scale", "linear") != "linear":
        return {}
    return {"checkpoint.interval": count(neox, "checkpoint_factor")}


# ------------------------------------------------------------------------------------------ layout and machines


def layout_size(neox: Values, key: str) -> int:
    return max(1, count(neox, key)) if key in neox else 1


def partition(neox: Values) -> dict[str, Any]:
    words = {"parameters": "parameters", "uniform": "uniform"}
    words |= {"type:transformer|mlp": "type:Block", "type:transformer": "type:Block"}
    return {"parallel.pipeline_partition": choice(neox, "pipe_partition_method", words)}


def offload(ours: str, key: str) -> Callable[[Values], dict[str, Any]]:
    """DeepSpeed's older switch, or its section with the device."""

    def convert(neox: Values) -> dict[str, Any]:
        value = neox[key]
        device = value.get("device", "none") if isinstance(value, Mapping) else "cpu" if value is True else "none"
        if device not in ("cpu", "none"):
            raise ValueError("must name the device cpu or none: nothing is moved to disks")
        return {ours: device == "cpu"}

    return convert


def cluster_kind(neox: Values) -> dict[str, Any]:
    """What starts the processes; nothing where no key asks for several machines."""
    if flag(neox, "deepspeed_slurm"):
        return {"cluster.kind": "slurm"}
    if flag(neox, "deepspeed_mpi"):
        return {"cluster.kind": "openmpi"}
    if "launcher" in neox:
        return {"cluster.kind": choice(neox, "launcher", LAUNCHERS)}
    return {"cluster.kind": "deepspeed"} if "hostfile" in neox else {}


def comment(key: str) -> Callable[[Values], dict[str, Any]]:
    return lambda neox: {"cluster.slurm.options": [f"--comment={neox[key]}"]}


# --------------------------------------------------------------------------------------------------------- data


def sources(neox: Values) -> dict[str, Any]:
    """One source by its path; several by the names of their files, with weights, which are equal unless given."""
    paths = neox.get("train_data_paths")
    if paths is None:
        return {}
    if "data_path" in neox:
        raise ValueError("must come without data_path")
    weights = neox.get("train_data_weights") or [1.0] * len(paths)
    if not isinstance(paths, list) or not isinstance(weights, list) or len(weights) != len(paths) or not paths:
        raise ValueError("must be as many paths as train_data_weights has weights")
    if len(paths) == 1:
        return {"data.train": paths[0]}
    names: list[str] = []
    for path in paths:
        name = Path(path).name
        repeated = sum(earlier == name or earlier.startswith(f"{name} ") for earlier in names)
        names.append(f"{name} {repeated + 1}" if repeated else name)
    return {
        "data.sources": dict(zip(names, paths, strict=True)),
        "data.weights": dict(zip(names, weights, strict=True)),
    }


CONVERSIONS: dict[str, Callable[[Values], dict[str, Any]]] = {
    "intermediate_size": intermediate_size,
    "expansion_factor": intermediate_size,
    "mlp_multiple_of": intermediate_size,
    "no_weight_tying": lambda neox: {"model.tie_word_embeddings": not flag(neox, "no_weight_tying")},
    "make_vocab_size_divisible_by": lambda neox: {
        "model.make_vocab_size_divisible_by": count(neox, "make_vocab_size_divisible_by")
        * layout_size(neox, "model_parallel_size")
    },
    "init_method": initializer_range,
    "init_method_std": initializer_range,
    "num_kv_heads": key_value_heads,
    "attention_config": attention,
    "train_batch_size": batch_sizes,
    "train_micro_batch_size_per_gpu": batch_sizes,
    "gradient_accumulation_steps": batch_sizes,
    "global_num_gpus": batch_sizes,
    "precision": precision,
    "fp16.enabled": precision,
    "bf16.enabled": precision,
    "optimizer.type": lambda neox: {
        "optimizer.name": choice(neox, "optimizer.type", dict.fromkeys(("adam", "cpu_adam", "cpu_torch_adam"), "adamw"))
    },
    "optimizer.params.betas": betas,
    "lr_decay_style": lambda neox: {
        "schedule.name": choice(neox, "lr_decay_style", {name: name for name in ("cosine", "linear", "constant")})
    },
    "min_lr": lambda neox: {
        "schedule.min_lr_ratio": rounded(number(neox, "min_lr") / number(neox, "optimizer.params.lr"))
    },
    "warmup": lambda neox: {
        "schedule.warmup_ratio": rounded(number(neox, "warmup") * decay_steps(neox) / count(neox, "train_iters"))
    },
    "lr_decay_iters": whole_decay,
    "lr_decay_fraction": whole_decay,
    "checkpoint_activations": lambda neox: {
        "train.activation_checkpointing": "full" if flag(neox, "checkpoint_activations") else "none"
    },
    "keep_last_n_checkpoints": lambda neox: {"checkpoint.keep_last": neox["keep_last_n_checkpoints"] or 0},
    "checkpoint_factor": checkpoint_interval,
    "use_wandb": lambda neox: {"logging.wandb": "online" if neox["use_wandb"] else "disabled"},
    "pipe_parallel_size": lambda neox: {"parallel.pipeline_parallel_size": layout_size(neox, "pipe_parallel_size")},
    "model_parallel_size": lambda neox: {"parallel.tensor_parallel_size": layout_size(neox, "model_parallel_size")},
    "pipe_partition_method": partition,
    "sequence_parallel": lambda neox: {
        "parallel.sequence_parallel": flag(neox, "sequence_parallel") and layout_size(neox, "model_parallel_size") > 1
    },
    "zero_optimization.stage": zero_stage,
    "zero_optimization.cpu_offload": offload("parallel.offload_optimizer", "zero_optimization.cpu_offload"),
    "zero_optimization.cpu_offload_params": offload(
        "parallel.offload_parameters", "zero_optimization.cpu_offload_params"
    ),
    "zero_optimization.cpu_offload_param": offload(
        "parallel.offload_parameters", "zero_optimization.cpu_offload_param"
    ),
    "zero_optimization.offload_optimizer": offload("parallel.offload_optimizer", "zero_optimization.offload_optimizer"),
    "zero_optimization.offload_param": offload("parallel.offload_parameters", "zero_optimization.offload_param"),
    "deepspeed_extra_args": lambda neox: {
        f"deepspeed.{key}": value for key, value in neox["deepspeed_extra_args"].items()
    },
    "data_path": lambda neox: {"data.train": neox["data_path"]},
    "train_data_paths": sources,
    "train_data_weights": sources,
    "num_nodes": lambda neox: {"cluster.num_nodes": neox["num_nodes"]} if neox["num_nodes"] != -1 else {},
    "hostfile": lambda neox: {"cluster.hostfile": neox["hostfile"], **cluster_kind(neox)},
    "launcher": cluster_kind,
    "deepspeed_slurm": cluster_kind,
    "deepspeed_mpi": cluster_kind,
    "comment": comment("comment"),
    "slurm_comment": comment("slurm_comment"),
}
"""GPT-NeoX's key to what makes our values of it."""
