"""The step loop: batch, forward, backward, clip, update; log; evaluate; save; and what is done when a step goes wrong.

Pretraining and instruction tuning share it; they differ in the stream and in where the weights come from.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from pathlib import Path

import torch.distributed as dist

from megakor.checkpoint.format import CheckpointManifest, step_folder
from megakor.checkpoint.keep import Keep
from megakor.checkpoint.save import Saver, Saving
from megakor.checkpoint.upload import Uploader, Uploading
from megakor.config.resolved import plain
from megakor.config.schema import CheckpointConfig, OnSpike
from megakor.data.stream import PretrainStream, digest_of
from megakor.logs import get_logger
from megakor.parallel.roll_call import connect_store
from megakor.parallel.together import on_first_rank, raise_together
from megakor.train.boundary import Boundary
from megakor.train.device import measure_peak_tflops
from megakor.train.engine import StepResult
from megakor.train.exit_record import ExitRecord, remove_exit
from megakor.train.metrics import read_metrics
from megakor.train.replicas import differing
from megakor.train.reporter import Heard, Pace, Reporter
from megakor.train.roll_back import roll_back
from megakor.train.schedule import learning_rate
from megakor.train.spikes import Spike, SpikeRule
from megakor.train.stop import Reason, StopRequest
from megakor.train.stragglers import ForwardTimes
from megakor.train.training import Training
from megakor.train.watchdog import Watchdog

log = get_logger(__name__)


def train(training: Training) -> None:
    """Train to `train.num_steps`, or until the run is asked to stop; every rank calls."""
    config, run = training.config, training.run
    if training.first_step >= config.train.num_steps:
        log.info("%s: nothing to do, step %d is reached already", config.name, training.first_step)
        if config.checkpoint.upload is not None:
            upload_last(training)
        return
    peak = config.logging.peak_tflops
    total_peak = peak * dist.get_world_size() if peak else measure_peak_tflops(config.train.precision)
    first_rank = dist.get_rank() == 0
    with ExitStack() as stack:
        loop = Loop(training, Reporter(training, total_peak), stack)
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
                ExitRecord(*outcome, loop.step, loop.saved, dist.get_world_size()).write(run)


def keep_rule(config: CheckpointConfig) -> Keep:
    """Which checkpoints stay, here and in object storage."""
    return Keep(config.keep_last, config.keep_every, config.keep_best)


def upload_last(training: Training) -> None:
    """Upload the last checkpoint of a run that has ended, unless it is there; every rank calls. OSError on all."""
    checkpoint, boundary = training.config.checkpoint, Boundary()
    assert checkpoint.upload is not None
    with closing(Uploader(training.run, checkpoint.upload, keep_rule(checkpoint))) as uploader:
        uploader.offer(step_folder(training.run, training.first_step))
        uploader.finish(lambda state: [int(number) for (number,) in boundary.meet([state])])


class Loop:
    """The steps of one start of a run.

    Attributes:
        step: optimizer steps done.
        saved: name of the newest checkpoint that was saved.
    """

    def __init__(self, training: Training, reporter: Reporter, stack: ExitStack) -> None:
        config, run, rank = training.config, training.run, dist.get_rank()
        keep = keep_rule(config.checkpoint)
        self.training, self.reporter = training, stack.enter_context(reporter)
        self.uploader = None
        if url := config.checkpoint.upload:
            self.uploader = stack.enter_context(closing(Uploader(run, url, keep, reporter.upload)))
        saver = Saver(run, training.engine.pieces, keep, config.checkpoint.asynchronous, self.on_its_way)
        self.saver = stack.enter_context(closing(saver))
        self.goes_up = False  # the checkpoint that was started last, once it is whole
        self.request = stack.enter_context(StopRequest(run, looks=rank == 0))
        self.watchdog = None
        if limit := config.health.hang_seconds:
            self.watchdog = stack.enter_context(Watchdog(run, limit, connect_store, rank, dist.get_world_size()))
        self.config, self.engine, self.stream = config, training.engine, training.stream
        self.boundary, self.forward_times = Boundary(), ForwardTimes(training.engine.built.module)
        positions = (training.engine.groups.position(axis) for axis in ("tensor", "pipeline", "context"))
        self.speaks_for_rows = not any(positions)  # of those that have the same rows
        self.step = training.first_step
        self.saved: str | None = None
        health = config.health
        self.spikes = SpikeRule(health.spike_window, health.spike_threshold, min(32, health.spike_window))
        self.spikes.refill(on_first_rank(lambda: read_metrics(training.run)))
        self.spikes.forget(self.step)
        self.skipped_in_a_row = self.roll_backs = 0

    def run(self) -> Reason:
        """Step by step to the end; what ended it before that. ValueError or OSError as below."""
        reason = Reason.none
        if self.uploader is not None and self.step:
            self.uploader.offer(step_folder(self.training.run, self.step))  # one that a crash has kept from going
        while self.step < self.config.train.num_steps and not reason:
            result, pace, digest = self.take_step()
            heard = self.meet(digest)
            reason = heard.reason
            self.reporter.step(self.step, result, pace, heard)
            if self.went_back(result):
                continue
            self.check_replicas()
            validation = self.evaluate() if self.due(self.config.evaluation.interval) else {}
            kept = self.due(self.config.checkpoint.interval)
            restart = self.config.checkpoint.restart_interval
            if kept or reason or (restart and self.step % restart == 0):
                self.save(kept, validation, last=bool(reason))
        self.beat("finishing")
        self.settled(self.saver.settle())
        if reason:
            log.warning("%s: %s asked to stop; step %d is saved", self.config.name, reason, self.step)
            self.request.take_back()
        try:
            if self.uploader is not None:
                self.uploader.finish(self.wait_for_upload)
        finally:
            self.saver.finish()
        return reason

    def on_its_way(self) -> set[int]:
        """Steps of the checkpoints that are being uploaded, or will be next."""
        return self.uploader.holds if self.uploader is not None else set()

    def wait_for_upload(self, state: Uploading) -> list[int]:
        """Everyone's states of the upload, at the end of the run."""
        self.beat("uploading")
        return [int(number) for (number,) in self.boundary.meet([state])]

    def due(self, interval: int) -> bool:
        """Whether what is done every so many steps, and at the end, is done after this one."""
        return bool(interval) and (self.step % interval == 0 or self.step == self.config.train.num_steps)

    def beat(self, phase: str) -> None:
        """Tell the watchdog what comes, which may take as long as its limit."""
        if self.watchdog is not None:
            self.watchdog.beat(self.step, phase)

    def take_step(self) -> tuple[StepResult, Pace, int]:
        """Batch, forward, backward, clip, update; with the digest of this rank's rows."""
        self.beat("training")
        start, engine, config = time.perf_counter(), self.engine, self.config
        batches = self.stream.micro_batches(self.step, engine.data_rank, engine.dims.data, engine.micro_batch_size)
        lr = learning_rate(config.schedule, config.optimizer.lr, self.step, config.train.num_steps)
        result = engine.train_step(batches, lr, self.step)
        self.step += 1
        return result, Pace(lr, time.perf_counter() - start), digest_of(batches) if self.speaks_for_rows else 0

    def went_back(self, result: StepResult) -> bool:
        """Whether the run went back before a spike at this step. All ranks have the same result.

        ValueError after too many steps in a row without a finite gradient.
        """
        if result.skipped:
            self.count_skipped()
            return False
        self.skipped_in_a_row = 0
        spike = None
        if self.config.health.on_spike is not OnSpike.off:
            spike = self.spikes.observe(self.step, result.loss, result.grad_norm)
        return spike is not None and self.act_on(spike)

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

    def act_on(self, spike: Spike) -> bool:
        """Tell of a spike; whether the run has gone back before it."""
        health, stream = self.config.health, self.stream
        self.reporter.spike(spike)
        if health.on_spike is not OnSpike.act:
            return False
        if self.roll_backs >= health.roll_back_limit:
            log.warning("health.roll_back_limit=%d is reached: the run goes on after its spike", health.roll_back_limit)
            return False
        assert isinstance(stream, PretrainStream), "the configuration's rules let no other stream act on spikes"
        self.beat("rolling back")
        self.settled(self.saver.settle())
        if self.uploader is not None:
            self.uploader.abandon()  # it is of steps that will not have been taken
        self.saver.finish()  # what is being removed must not be removed twice
        found = roll_back(self.training.run, self.engine, stream, spike, health.spike_skip)
        if found is None:
            log.warning("%s: there is no checkpoint before it to go back to", spike)
            return False
        self.step, self.stream = found
        self.roll_backs += 1
        self.spikes.forget(self.step)
        return True

    def meet(self, digest: int) -> Heard:
        """Hear from all ranks; settle a checkpoint that all have written, and go on with one that all have sent."""
        uploading = self.uploader.state if self.uploader is not None else Uploading.idle
        own = [self.request.reason, self.saver.state, uploading, self.forward_times.take(), digest]
        reasons, states, uploads, seconds, digests = map(list, zip(*self.boundary.meet(own), strict=True))
        if self.uploader is not None:
            self.uploader.heard([int(state) for state in uploads])
        if Saving.failed in states or set(states) == {Saving.written}:
            self.settled(self.saver.settle())
        return Heard(Reason(int(max(reasons))), seconds, int(sum(digests)))

    def check_replicas(self) -> None:
        """Compare weights that must be the same, when that is due. OSError on all ranks when some are not.

        Replicas hold the same weights; under ZeRO-1 and 2 those are fresh copies of their owners' after every step.
        Tensor ranks hold the same norms and biases of row-parallel layers, each with masters of its own.
        """
        interval = self.config.health.replica_check_interval
        if not interval or self.step % interval:
            return
        built, groups = self.engine.built, self.engine.groups
        different = differing(built.named, groups.replicas)
        whole = [(name, parameter) for name, parameter in built.named if built.held[name].shard.count == 1]
        if groups.dims.tensor > 1 and whole:
            different += differing(whole, groups.tensor)
        error = ValueError("; ".join(map(str, different))) if different else None
        telling = f"run={self.training.run}: comparing the replicas' weights after step {self.step}"
        raise_together(
            error, telling, "a device's memory or arithmetic is at fault; go on without it, from a checkpoint"
        )

    def evaluate(self) -> dict[str, float]:
        """The loss on each held-out set."""
        losses = {}
        self.beat("evaluating")
        for heldout in self.training.heldout:
            nats = self.engine.evaluate(heldout)
            losses[heldout.name] = nats / heldout.num_tokens
            self.reporter.validation(self.step, heldout, nats)
        return losses

    def save(self, kept: bool, validation: dict[str, float], last: bool = False) -> None:
        """Begin to save a checkpoint; training waits for an earlier one, and for the copy.

        Args:
            last: whether the run ends with it; it is uploaded then even if it is for a restart alone.
        """
        self.beat("saving")
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
        self.goes_up = kept or last
        self.settled(self.saver.start(manifest))
        self.reporter.save(self.step, time.perf_counter() - start)

    def settled(self, folder: Path | None) -> None:
        """Note a checkpoint that is whole."""
        if folder is not None:
            self.saved = folder.name
            log.info("checkpoint %s is whole", folder.name)
            if self.uploader is not None and self.goes_up:
                self.uploader.offer(folder)
