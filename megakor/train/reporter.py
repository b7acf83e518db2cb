"""What rank 0 says about a run: progress, log lines and metric records."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch.distributed as dist

from megakor.config.resolved import plain
from megakor.config.schema import ModelConfig
from megakor.logs import Progress, get_logger, progress
from megakor.model.flops import train_flops_per_token
from megakor.model.specs import num_parameters
from megakor.train.engine import StepResult
from megakor.train.metrics import Metrics, Throughput, next_attempt
from megakor.train.spikes import Spike
from megakor.train.stop import Reason
from megakor.train.stragglers import spread
from megakor.train.training import Heldout, Training

log = get_logger(__name__)


@dataclass(frozen=True)
class Pace:
    """Of a step: its learning rate, and its wall time in seconds."""

    lr: float
    seconds: float


@dataclass(frozen=True)
class Heard:
    """What all ranks told after a step.

    Attributes:
        reason: why the run is to stop, if it is.
        forward_seconds: of each rank's forward passes.
        batch_digest: of the global batch's rows, the same in every layout.
    """

    reason: Reason
    forward_seconds: list[float]
    batch_digest: int


class Reporter:
    """Rank 0's words about the run: progress, log lines and metric records; silent on other ranks."""

    def __init__(self, training: Training, peak_tflops: float) -> None:
        self.training, self.peak_tflops, config = training, peak_tflops, training.config
        self.flops_per_token = train_flops_per_token(training.engine.model, config.train.sequence_length)
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

    def step(self, step: int, result: StepResult, pace: Pace, heard: Heard) -> None:
        self.bar.update(1)
        if self.metrics is None or step % self.training.config.logging.interval:
            return
        plan = self.training.stream.plan
        speed = Throughput(pace.seconds, plan.num_tokens(step - 1), self.flops_per_token, self.peak_tflops).record()
        of_ranks = spread(heard.forward_seconds) if len(heard.forward_seconds) > 1 else {}
        told = {"skipped": True} if result.skipped else {}
        self.metrics.write(
            "train", step, loss=result.loss, lr=pace.lr, grad_norm=result.grad_norm,
            tokens=plan.num_tokens_before(step), batch_digest=f"{heard.batch_digest:x}", **speed, **of_ranks, **told,
        )  # fmt: skip
        if step % max(1, self.training.config.train.num_steps // 20) == 0 or step == self.training.first_step + 1:
            log.info(
                "step %d  loss %.4f  lr %.3g  grad norm %.3f  %s tokens/s  %.4f TFLOP/s  MFU %.1f %%",
                step, result.loss, pace.lr, result.grad_norm, f"{speed['tokens_per_second']:,.0f}", speed["tflops"],
                100 * speed["mfu"],
            )  # fmt: skip

    def spike(self, spike: Spike) -> None:
        if self.metrics is not None:
            about = {key: value for key, value in asdict(spike).items() if key != "step"}
            self.metrics.write("spike", spike.step, **about)
            log.warning("%s", spike)

    def validation(self, step: int, heldout: Heldout, nats: float) -> None:
        if self.metrics is None:
            return
        loss = nats / heldout.num_tokens
        bits = nats / math.log(2) / heldout.num_text_bytes
        self.metrics.write("validation", step, set=heldout.name, loss=loss, bits_per_byte=bits)
        log.info("step %d  %s: loss %.4f, %.4f bits per byte", step, heldout.name, loss, bits)

    def upload(self, step: int, seconds: float, num_bytes: int) -> None:
        if self.metrics is not None:
            self.metrics.write("upload", step, seconds=seconds, bytes=num_bytes)

    def save(self, step: int, seconds: float) -> None:
        if self.metrics is not None:
            self.metrics.write("save", step, seconds=seconds)
            log.info("step %d  checkpoint begun; training waited %.2f s", step, seconds)
