"""Layouts that plans and simulations are compared on."""

from __future__ import annotations

from typing import Any

from megakor.config.checks import check_engine, check_fit
from megakor.config.schema import (
    ActivationCheckpointing,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    SimulateConfig,
    TrainConfig,
)

MODEL = {
    "hidden_size": 1024,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "vocab_size": 8192,
    "rotary_pct": 0.5,
}
TRAIN = {"num_steps": 1, "global_batch_size": 16, "micro_batch_size": 2, "sequence_length": 1024}


def sized(**sizes: int) -> dict[str, Any]:
    """Parallel sizes by axis."""
    return {f"parallel__{axis}_parallel_size": size for axis, size in sizes.items()}


def recomputed(kind: str, interval: int = 1) -> dict[str, Any]:
    return {
        "train__activation_checkpointing": ActivationCheckpointing(kind),
        "train__activation_checkpointing_interval": interval,
    }


SEQUENCE = {"parallel__sequence_parallel": True}
IN_TURN = {"model__use_parallel_residual": False}
TIED = {"model__tie_word_embeddings": True}
FP32 = {"train__precision": Precision.fp32}
ONE = {"train__micro_batch_size": 1}
UNIFORM = {"parallel__pipeline_partition": "uniform"}
DROPOUT = {"model__hidden_dropout": 0.1}
LARGE_VOCABULARY = {"model__vocab_size": 65536, "train__micro_batch_size": 4}

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp32 in turn, tied": FP32 | IN_TURN | TIED,
    "no biases, full rotation, zero 3": {
        "model__attention_bias": False, "model__rotary_pct": 1.0, "parallel__zero_stage": 3,
    },
    "logits of several chunks": LARGE_VOCABULARY,
    "several chunks, fp32": LARGE_VOCABULARY | FP32,
    "full": recomputed("full"),
    "full, every third": recomputed("full", 3),
    "selective": recomputed("selective"),
    "tp 2": sized(tensor=2),
    "tp 4 tied, one sequence": sized(tensor=4) | TIED | ONE,
    "tp 4 sp": sized(tensor=4) | SEQUENCE,
    "tp 8 sp, one sequence": sized(tensor=8) | SEQUENCE | ONE,
    "tp 8 sp in turn, full": sized(tensor=8) | SEQUENCE | IN_TURN | recomputed("full"),
    "tp 4 sp in turn, selective, fp32": sized(tensor=4) | SEQUENCE | IN_TURN | recomputed("selective") | FP32,
    "cp 2": sized(context=2),
    "tp 2 sp cp 4, selective": sized(tensor=2, context=4) | SEQUENCE | recomputed("selective"),
    "pp 2": sized(pipeline=2),
    "pp 3 tied, full every second": sized(pipeline=3) | TIED | recomputed("full", 2),
    "pp 4 uniform, in turn": sized(pipeline=4) | UNIFORM | IN_TURN,
    "pp 4, embedding alone": sized(pipeline=4) | {"model__vocab_size": 32768},
    "tp 2 pp 4, embedding alone": sized(tensor=2, pipeline=4) | {"model__vocab_size": 65536},
    "tp 4 sp pp 2, one sequence": sized(tensor=4, pipeline=2) | SEQUENCE | ONE,
    "tp 2 sp pp 3 full": sized(tensor=2, pipeline=3) | SEQUENCE | recomputed("full"),
    "tp 4 pp 5 selective, by type": (
        sized(tensor=4, pipeline=5) | recomputed("selective") | {"parallel__pipeline_partition": "type:Block"}
    ),
}  # fmt: skip
WITH_DROPOUT = {
    "dropout": DROPOUT,
    "dropout, tp 2 in turn, full": DROPOUT | sized(tensor=2) | IN_TURN | recomputed("full"),
    "dropout, tp 4 sp pp 2, selective": DROPOUT | sized(tensor=4, pipeline=2) | SEQUENCE | recomputed("selective"),
}


def layout(changes: dict[str, Any]) -> SimulateConfig:
    """A legal configuration with some keys changed, `section__key`."""
    sections: dict[str, dict[str, Any]] = {"model": dict(MODEL), "train": dict(TRAIN), "parallel": {}}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        sections[section][key] = value
    config = SimulateConfig(
        run="-",
        model=ModelConfig(**sections["model"]),
        parallel=ParallelConfig(**sections["parallel"]),
        train=TrainConfig(**sections["train"]),
        optimizer=OptimizerConfig(lr=1.0),
        data=DataConfig(tokenizer="-"),
    )
    check_engine(config)
    check_fit(config, config.model)
    return config
