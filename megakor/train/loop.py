"""The step loop: batch, forward, backward, clip, update; log; evaluate; save; and what is done when a step goes wrong.

Pretraining and instruction tuning share it; they differ in the stream and in where the weights come from.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import torch.distributed as dist

from megakor.checkpoint.format import CheckpointManifest
from megakor.checkpoint.keep import Keep
from megakor.checkpoint.save import Saver, Saving
from megakor.config.schema import OnSpike
from megakor.data.stream import PretrainStream
from megakor.logs import get_logger
from megakor.model.flops import train_flops_per_token
from megakor.parallel.together import on_first_rank
from megakor.train.boundary import Boundary
from megakor.train.device import measure_peak_tflops
from megakor.train.exit_record import ExitRecord, remove_exit
from megakor.train.metrics import read_metrics
from megakor.train.reporter import Reporter
from megakor.train.roll_back import roll_back
from megakor.train.run import plain
from megakor.train.schedule import learning_rate
from megakor.train.spikes import Spike, SpikeRule
from megakor.train.stop import Reason, StopRequest
from megakor.train.training import Training

log = get_logger(__name__)


def train(training: Training) -> None:
    """Train to `train.num_steps`, or until the run is asked to stop; every rank calls."""
    config, run = training.config, training.run
    if training.first_step >= config.train.num_steps:
        log.info("%s: nothing to do, step %d is reached already", config.name, training.first_step)
        return
    peak = config.logging.peak_tflops
    total_peak = peak * dist.get_world_size() if peak else measure_peak_tflops(config.train.precision)
    keep = Keep(config.checkpoint.keep_last, config.checkpoint.keep_every, config.checkpoint.keep_best)
    first_rank = dist.get_rank() == 0
    with (
        Reporter(
            training, total_peak, train_flops_per_token(training.engine.model, config.train.sequence_length)
        ) as reporter,
        closing(Saver(run, training.engine.pieces, keep, config.checkpoint.asynchronous)) as saver,
        StopRequest(run, looks=first_rank) as request,
    ):
        loop = Loop(training, reporter, saver, request)
        if first_rank:
            remove_exit(run)
        outcome = "failed", "killed"
        try:
            reason = loop.run()
            outcome = ("stopped", str(reason)) if reason else ("finished", "")
        except BaseException as error:
            outcome = "failed", f"{type(error).__name__}: {error}"
            raise
        finally:
            if first_rank:
                record = ExitRecord(*outcome, loop.step, loop.saved, dist.get_world_size())
                record.write(run)


class Loop:
    """The steps of one start of a run.

    Attributes:
        step: optimizer steps done.
        saved: name of the newest checkpoint that was saved.
    """

    def __init__(self, training: Training, reporter: Reporter, saver: Saver, request: StopRequest) -> None:
        self.training, self.reporter, self.saver, self.request = training, reporter, saver, request
        self.config, self.engine, self.stream = training.config, training.engine, training.stream
        self.boundary = Boundary()
        self.step = training.first_step
        self.saved: str | None = None
        health = self.config.health
        self.spikes = SpikeRule(health.spike_window, health.spike_threshold, min(32, health.spike_window))
        self.spikes.refill(on_first_rank(lambda: read_metrics(training.run)))
        self.spikes.forget(self.step)
        self.skipped_in_a_row = self.roll_backs = 0

    def run(self) -> Reason:
        """Step by step to the end; what ended it before that."""
        reason = Reason.none
        while self.step < self.config.train.num_steps and not reason:
            spike = self.take_step()
            if spike is not None and self.went_back(spike):
                continue
            validation = self.evaluate() if self.due(self.config.evaluation.interval) else {}
            reason = self.meet()
            kept = self.due(self.config.checkpoint.interval)
            restart = self.config.checkpoint.restart_interval
            if kept or reason or (restart and self.step % restart == 0):
                self.save(kept, validation)
        self.saver.finish()
        if reason:
            log.warning("%s: %s asked to stop; step %d is saved", self.config.name, reason, self.step)
            self.request.take_back()
        return reason

    def due(self, interval: int) -> bool:
        """Whether what is done every so many steps, and at the end, is done after this one."""
        return bool(interval) and (self.step % interval == 0 or self.step == self.config.train.num_steps)

    def take_step(self) -> Spike | None:
        """Batch, forward, backward, clip, update; log. Whether it was a spike.

        ValueError after too many steps in a row without a finite gradient.
        """
        start, engine, config = time.perf_counter(), self.engine, self.config
        batches = self.stream.micro_batches(self.step, engine.data_rank, engine.dims.data, engine.micro_batch_size)
        lr = learning_rate(config.schedule, config.optimizer.lr, self.step, config.train.num_steps)
        result = engine.train_step(batches, lr, self.step)
        self.step += 1
        seconds = time.perf_counter() - start
        self.reporter.step(self.step, seconds, loss=result.loss, lr=lr, grad_norm=result.grad_norm)
        if result.skipped:
            self.count_skipped()
            return None
        self.skipped_in_a_row = 0
        if config.health.on_spike is OnSpike.off:
            return None
        return self.spikes.observe(self.step, result.loss, result.grad_norm)

    def count_skipped(self) -> None:
        """Tell of a step that has changed nothing; the last straw ends the run."""
        self.skipped_in_a_row += 1
        limit = self.config.health.skip_limit
        log.warning("step %d: its loss or gradient is not finite; nothing is changed by it", self.step)
        if self.skipped_in_a_row >= limit:
            raise ValueError(
                f"run={self.training.run}: loss and gradient must be finite, and were not in {limit} steps in a row up "
                f"to {self.step} (health.skip_limit={limit}); try a lower optimizer.lr from an earlier checkpoint"
            )

    def went_back(self, spike: Spike) -> bool:
        """Tell of a spike; whether the run has gone back before it. All ranks saw the same one."""
        health, stream = self.config.health, self.stream
        self.reporter.spike(spike)
        if health.on_spike is not OnSpike.act:
            return False
        if self.roll_backs >= health.roll_back_limit:
            log.warning("health.roll_back_limit=%d is reached: the run goes on after its spike", health.roll_back_limit)
            return False
        assert isinstance(stream, PretrainStream), "the configuration's rules let no other stream act on spikes"
        self.settled(self.saver.settle())
        found = roll_back(self.training.run, self.engine, stream, spike, health.spike_skip)
        if found is None:
            log.warning("%s: there is no checkpoint before it to go back to", spike)
            return False
        self.step, self.stream = found
        self.roll_backs += 1
        self.spikes.forget(self.step)
        return True

    def meet(self) -> Reason:
        """Hear from all ranks; settle a checkpoint that all have written. Why the run is to stop, if it is."""
        everyone = self.boundary.meet([self.request.reason, self.saver.state])
        states = {Saving(int(state)) for _, state in everyone}
        if Saving.failed in states or states == {Saving.written}:
            self.settled(self.saver.settle())
        return Reason(int(max(reason for reason, _ in everyone)))

    def evaluate(self) -> dict[str, float]:
        """The loss on each held-out set."""
        losses = {}
        for heldout in self.training.heldout:
            nats = self.engine.evaluate(heldout)
            losses[heldout.name] = nats / heldout.num_tokens
            self.reporter.validation(self.step, heldout, nats)
        return losses

    def save(self, kept: bool, validation: dict[str, float]) -> None:
        """Begin to save a checkpoint; training waits for an earlier one, and for the copy."""
        start, engine = time.perf_counter(), self.engine
        self.settled(self.saver.settle())
        manifest = CheckpointManifest(
            step=self.step,
            num_tokens=engine.num_tokens,
            model=plain(engine.model),
            tokenizer_fingerprint=self.training.tokenizer_fingerprint,
            optimizer={"name": self.config.optimizer.name.value, **engine.optimizer_state()},
            data=self.stream.state(self.step),
            train=plain(self.config),
            kept=kept,
            validation=validation,
        )
        self.settled(self.saver.start(manifest))
        self.reporter.save(self.step, time.perf_counter() - start)

    def settled(self, folder: Path | None) -> None:
        """Note a checkpoint that is whole."""
        if folder is not None:
            self.saved = folder.name
            log.info("checkpoint %s is whole", folder.name)
