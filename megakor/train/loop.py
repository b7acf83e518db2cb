"""The step loop: batch, forward, backward, clip, update; log; evaluate; save.

Pretraining and instruction tuning share it; they differ in the stream and in where the weights come from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from megakor.checkpoint.format import CheckpointManifest
from megakor.checkpoint.save import save_checkpoint
from megakor.config.schema import EngineConfig, ModelConfig
from megakor.data.plan import Plan
from megakor.data.stream import Batch
from megakor.logs import Progress, get_logger, progress
from megakor.model.flops import train_flops_per_token
from megakor.model.parameters import num_parameters
from megakor.train.device import measure_peak_tflops
from megakor.train.engine import Engine, HeldoutWindows
from megakor.train.metrics import Metrics, Throughput, next_attempt
from megakor.train.run import plain
from megakor.train.schedule import learning_rate

log = get_logger(__name__)


class Stream(Protocol):
    """A source of global batches that is a pure function of the step."""

    @property
    def plan(self) -> Plan: ...

    def micro_batches(self, step: int, dp_rank: int, dp_size: int, micro_batch_size: int) -> list[Batch]: ...

    def state(self, step: int) -> dict[str, Any]: ...


class Heldout(HeldoutWindows, Protocol):
    """A named held-out set with its counts."""

    name: str
    num_tokens: int
    num_text_bytes: int


@dataclass(frozen=True)
class Training:
    """Everything that a training run works with.

    Attributes:
        config: the run.
        run: its folder.
        engine: the model in training.
        stream: the training batches.
        heldout: named held-out sets.
        tokenizer_fingerprint: of the tokenizer that the data was made with.
        first_step: optimizer steps that are done already.
    """

    config: EngineConfig
    run: Path
    engine: Engine
    stream: Stream
    heldout: Sequence[Heldout]
    tokenizer_fingerprint: str
    first_step: int


def train(training: Training) -> None:
    """Train to `train.num_steps`; every rank calls."""
    config, engine = training.config, training.engine
    if training.first_step >= config.train.num_steps:
        log.info("%s: nothing to do, step %d is reached already", config.name, training.first_step)
        return
    peak = config.logging.peak_tflops
    total_peak = peak * dist.get_world_size() if peak else measure_peak_tflops(config.train.precision)
    num_steps = config.train.num_steps
    flops = train_flops_per_token(engine.model, config.train.sequence_length)
    with Reporter(training, total_peak, flops) as reporter:
        for step in range(training.first_step, num_steps):
            start = time.perf_counter()
            batches = training.stream.micro_batches(step, engine.data_rank, engine.dims.data, engine.micro_batch_size)
            lr = learning_rate(config.schedule, config.optimizer.lr, step, num_steps)
            result = engine.train_step(batches, lr, step)
            done = step + 1
            reporter.step(done, time.perf_counter() - start, loss=result.loss, lr=lr, grad_norm=result.grad_norm)
            if config.evaluation.interval and (done % config.evaluation.interval == 0 or done == num_steps):
                for heldout in training.heldout:
                    reporter.validation(done, heldout, engine.evaluate(heldout))
            if done % config.checkpoint.interval == 0 or done == num_steps:
                reporter.save(done, save(training, done))


def save(training: Training, step: int) -> float:
    """Save a checkpoint; returns the seconds it took. Every rank calls."""
    start = time.perf_counter()
    engine, config = training.engine, training.config
    manifest = CheckpointManifest(
        step=step,
        num_tokens=engine.num_tokens,
        model=plain(engine.model),
        tokenizer_fingerprint=training.tokenizer_fingerprint,
        optimizer={"name": config.optimizer.name.value, **engine.optimizer_state()},
        data=training.stream.state(step),
        train=plain(config),
    )
    save_checkpoint(training.run, manifest, engine.pieces, config.checkpoint.keep_last)
    return time.perf_counter() - start


class Reporter:
    """Rank 0's words about the run: progress, log lines and metric records; silent on other ranks."""

    def __init__(self, training: Training, peak_tflops: float, flops_per_token: float) -> None:
        self.training, self.peak_tflops, self.flops_per_token = training, peak_tflops, flops_per_token
        config = training.config
        self.metrics: Metrics | None = None
        if dist.get_rank() == 0:
            attempt = next_attempt(training.run)
            self.metrics = Metrics(training.run, config.name, config.logging, plain(config), attempt)
            model: ModelConfig = training.engine.model
            count = num_parameters(model)
            self.metrics.write(
                "start",
                training.first_step,
                world_size=dist.get_world_size(),
                peak_tflops=peak_tflops,
                num_parameters=count,
            )
            log.info(
                "%s: %s parameters, steps %d to %d, %d ranks (%d stages × %d replicas), peak %.3g TFLOP/s",
                config.name, f"{count:,}", training.first_step, config.train.num_steps, dist.get_world_size(),
                training.engine.dims.pipeline, training.engine.dims.data, peak_tflops,
            )  # fmt: skip
            engine, size = training.engine, config.train.global_batch_size
            rows = engine.num_micro_batches * engine.micro_batch_size * engine.dims.data
            if rows > size:
                log.warning("train.global_batch_size=%d: %d rows of a step are filled up", size, rows - size)
        remaining = config.train.num_steps - training.first_step
        self.bar: Progress[None] = progress(total=remaining, unit="step", description=config.name)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        if self.metrics is not None:
            self.metrics.__exit__(*exception)

    def step(self, step: int, seconds: float, loss: float, lr: float, grad_norm: float) -> None:
        self.bar.update(1)
        if self.metrics is None or step % self.training.config.logging.interval:
            return
        plan = self.training.stream.plan
        tokens = plan.num_tokens(step - 1)
        speed = Throughput(seconds, tokens, self.flops_per_token, self.peak_tflops).record()
        self.metrics.write(
            "train", step, loss=loss, lr=lr, grad_norm=grad_norm, tokens=plan.num_tokens_before(step), **speed
        )
        if step % max(1, self.training.config.train.num_steps // 20) == 0 or step == self.training.first_step + 1:
            log.info(
                "step %d  loss %.4f  lr %.3g  grad norm %.3f  %s tokens/s  %.4f TFLOP/s  MFU %.1f %%",
                step, loss, lr, grad_norm, f"{speed['tokens_per_second']:,.0f}", speed["tflops"], 100 * speed["mfu"],
            )  # fmt: skip

    def validation(self, step: int, heldout: Heldout, nats: float) -> None:
        if self.metrics is None:
            return
        loss = nats / heldout.num_tokens
        bits = nats / math.log(2) / heldout.num_text_bytes
        self.metrics.write("validation", step, set=heldout.name, loss=loss, bits_per_byte=bits)
        log.info("step %d  %s: loss %.4f, %.4f bits per byte", step, heldout.name, loss, bits)

    def save(self, step: int, seconds: float) -> None:
        if self.metrics is not None:
            self.metrics.write("save", step, seconds=seconds)
            log.info("step %d  checkpoint saved in %.2f s", step, seconds)
