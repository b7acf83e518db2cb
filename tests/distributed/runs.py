"""Pretraining runs of a tiny model: their configurations, and the functions that ranks run."""

from __future__ import annotations

import copy
import logging
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megakor import pretrain
from megakor.checkpoint import save as saving
from megakor.config.checks import check
from megakor.config.schema import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    OptimizerName,
    ParallelConfig,
    Precision,
    PretrainConfig,
    ScheduleConfig,
    TrainConfig,
    WandbMode,
)
from megakor.parallel.dims import ParallelDims
from megakor.train.engine import Engine
from megakor.train.metrics import read_metrics
from tests.ranks import run_ranks

ENUMS = {"train.precision": Precision, "optimizer.name": OptimizerName}


@dataclass(frozen=True)
class Made:
    """Shards, held-out shards and the tokenizer that made them."""

    train: str
    heldout: str
    tokenizer: str


def configuration(made: Made, run: Path, **changes: Any) -> PretrainConfig:
    """A run of 12 steps in fp32; `changes` are dotted keys with `__` for the dot."""
    config = PretrainConfig(
        name="시험",
        run=str(run),
        parallel=ParallelConfig(),
        train=TrainConfig(
            seed=7, num_steps=12, global_batch_size=8, micro_batch_size=2, sequence_length=32, precision=Precision.fp32
        ),
        optimizer=OptimizerConfig(lr=3e-3),
        schedule=ScheduleConfig(warmup_ratio=0.2),
        checkpoint=CheckpointConfig(interval=100, keep_last=0),
        evaluation=EvaluationConfig(interval=6),
        logging=LoggingConfig(wandb=WandbMode.disabled, peak_tflops=0.1),
        model=ModelConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, rotary_pct=0.5,
            max_position_embeddings=64,
        ),
        data=DataConfig(train=made.train, validation={"held": made.heldout}, tokenizer=made.tokenizer),
    )  # fmt: skip
    for name, value in changes.items():
        target: Any = config
        *sections, last = name.split("__")
        for section in sections:
            target = getattr(target, section)
        enum = ENUMS.get(".".join((*sections, last)))
        setattr(target, last, enum(value) if enum else value)
    check(config)
    return config


PP2 = {"parallel__pipeline_parallel_size": 2}
BF16 = {"train__precision": "bf16"}
ADAFACTOR = {"optimizer__name": "adafactor", "optimizer__lr": 1e-3}
TIED = {"model__tie_word_embeddings": True}


def zero(stage: int) -> dict[str, int]:
    return {"parallel__zero_stage": stage}


class Stop(Exception):
    """Ends a run in the middle, as far as the disk can tell."""


@contextmanager
def _layout(config: EngineConfig) -> Iterator[ParallelDims]:
    yield ParallelDims.from_config(config.parallel, dist.get_world_size())


@dataclass
class Job:
    """A run, and how it ends.

    Attributes:
        stop: raise before this step (from 0) on every rank.
        kill: SIGKILL before this step on one rank.
        kill_saving: SIGKILL of rank 0 when the checkpoint of this step is whole but not committed.
        change: keys that differ on rank 1.
    """

    config: PretrainConfig
    stop: int | None = None
    kill: int | None = None
    kill_saving: int | None = None
    rank: int = 1
    change: dict[str, Any] = field(default_factory=dict)


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname}: {record.getMessage()}")


def ended_by(job: Job, real_step: Callable) -> Callable:
    def train_step(engine: Engine, batches: list, lr: float, step: int) -> Any:
        if step == job.stop:
            raise Stop
        if step == job.kill and dist.get_rank() == job.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return real_step(engine, batches, lr, step)

    return train_step


def run_job(job: Job) -> tuple[str | None, list[str]]:
    """Run `megakor pretrain` in the group that is there. Returns the error, if any, and the log's lines."""
    real_step, real_commit = Engine.train_step, saving.commit
    kept = Kept()
    logging.getLogger("megakor").addHandler(kept)

    def commit(aside: Path, folder: Path, *rest: Any) -> None:
        if job.kill_saving is not None and folder.name.endswith(f"{job.kill_saving:08d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        real_commit(aside, folder, *rest)

    pretrain.process_group = _layout
    Engine.train_step, saving.commit = ended_by(job, real_step), commit  # type: ignore[assignment, method-assign]
    try:
        config = copy.deepcopy(job.config)
        if job.stop is not None:
            config.checkpoint.asynchronous = False  # what is saved before it stops is to be there
        pretrain.run(config)
        return None, kept.lines
    except Stop:
        return None, kept.lines
    except (ValueError, OSError) as error:
        return str(error), kept.lines
    except Exception:  # a defect; it fails the tests of this run and no others
        return traceback.format_exc(), kept.lines
    finally:
        Engine.train_step, saving.commit = real_step, real_commit  # type: ignore[method-assign]
        logging.getLogger("megakor").removeHandler(kept)


def run_jobs(jobs: list[Job]) -> list[tuple[str | None, list[str]]]:
    return [run_job(job) for job in jobs]


def run_all(world_size: int, jobs: list[Job]) -> list[tuple[str | None, list[str]]]:
    """Rank 0's answers to all the jobs. Pipelines have a group of their own: after one, DeepSpeed's plain engine finds
    the other's groups in a module global and fails."""
    answers: list[Any] = [None] * len(jobs)
    for pipelined in (False, True):
        mine = [i for i, job in enumerate(jobs) if (job.config.parallel.pipeline_parallel_size > 1) is pipelined]
        if mine:
            first, *_ = run_ranks(run_jobs, world_size, [jobs[index] for index in mine])
            for index, answer in zip(mine, first, strict=True):
                answers[index] = answer
    return answers


def check_same(first: PretrainConfig, second: PretrainConfig) -> str:
    """What `check_same_everywhere` says when rank 1 has another configuration."""
    from megakor.config.resolved import plain
    from megakor.train.run import check_same_everywhere

    try:
        check_same_everywhere(plain(first if dist.get_rank() == 0 else second))
    except ValueError as error:
        return str(error)
    return "nothing"


Curve = list[tuple[int, float, float]]


def curve(run: Path) -> Curve:
    """(step, loss, gradient norm) of every step, the last attempt's where a step was repeated."""
    found = {r["step"]: (r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(run) if r["kind"] == "train"}
    return [found[step] for step in sorted(found)]


def validation(run: Path) -> list[tuple[int, float, float]]:
    found = {
        r["step"]: (r["step"], r["loss"], r["bits_per_byte"]) for r in read_metrics(run) if r["kind"] == "validation"
    }
    return [found[step] for step in sorted(found)]
