"""The engine of a run: DeepSpeed's plain or pipeline engine behind one `train_step` and one `evaluate`.

This module and `megakor.checkpoint` are the only ones that talk to DeepSpeed's engines. Every method here is called
by every rank.

    module ─► initial values by name ─► deepspeed.initialize ─► fp32 masters and moments by name ─► steps
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import deepspeed
import numpy as np
import torch
import torch._dynamo  # torch.optim would import it later, when the collector is at work
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from megakor.checkpoint.format import WEIGHT
from megakor.config.schema import EngineConfig, LoraConfig, ModelConfig
from megakor.data.stream import Batch
from megakor.model.documents import Borders
from megakor.model.gpt_neox import Block
from megakor.parallel.build import Built, build
from megakor.parallel.context import own_part
from megakor.parallel.dims import ParallelDims
from megakor.parallel.groups import Groups, ModelParallelUnit
from megakor.train.adafactor import Sharing
from megakor.train.device import DTYPES, attending, device, loss_chunk, to_device, without_compiler
from megakor.train.fragments import flats, fragments, is_partitioned, own_range
from megakor.train.guard import drop_gradients, norm_of_all_groups, see_all_gradients
from megakor.train.loss_scale import restore_scaler, scaler_state
from megakor.train.optimizer import (
    Piece,
    build_optimizer,
    optimizer_pieces,
    optimizer_steps,
    prepare_state,
    set_optimizer_steps,
)
from megakor.train.settings import deepspeed_config
from megakor.train.values import Values

READERS = 4
"""Threads that read a checkpoint on each rank."""


@dataclass(frozen=True)
class StepResult:
    """What a step tells, the same on every rank.

    Attributes:
        loss: nats per unmasked token of the global batch.
        grad_norm: the gradient norm before clipping; not a finite number where the step was skipped.
        skipped: whether the loss or a gradient of any rank was not finite, so that the step changed nothing: neither
            weights nor optimizer state nor the number of updates.
    """

    loss: float
    grad_norm: float
    skipped: bool = False


class HeldoutWindows(Protocol):
    """A held-out set, cut into windows."""

    num_windows: int
    sequence_length: int

    def windows(self, start: int, count: int) -> Batch: ...


class Engine:
    """A model in training on this rank.

    Args:
        config: the run.
        model: the architecture, `vocab_size` resolved.
        num_tokens: the true vocabulary.
        dims: the layout.
        values: where weights and optimizer state come from.
        lora: adapters to train in place of the parameters; None: all parameters are trained.
    """

    built: Built
    optimizer: torch.optim.Optimizer
    engine: Any
    """DeepSpeed's."""
    group_settings: list[dict[str, int | float]]
    """What the optimizer's groups were set to, but for the learning rate."""
    pieces: list[Piece]
    """What this rank owns of the fp32 masters and the optimizer state."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        num_tokens: int,
        dims: ParallelDims,
        values: Values,
        lora: LoraConfig | None = None,
    ) -> None:
        self.dims, self.model, self.num_tokens, self.lora = dims, model, num_tokens, lora
        self.groups = Groups.create(dims)
        self.data_rank = self.groups.position("data")
        self.num_micro_batches = dims.num_micro_batches(config.train)
        self.micro_batch_size, self.sequence_length = config.train.micro_batch_size, config.train.sequence_length
        self.pipelined = dims.pipeline > 1
        self.clip_grad_norm = config.train.clip_grad_norm
        self.clips_itself = config.parallel.zero_stage == 0  # DeepSpeed then tells no norm unless it clips
        self._build(config, values)
        self._initialize(config)
        self._own(config, values)

    def _build(self, config: EngineConfig, values: Values) -> None:
        """Make this rank's part of the model, with its weights."""
        partitioned = config.parallel.zero_stage == 3
        with self._partitioning(config) if partitioned else nullcontext():
            precision = config.train.precision
            self.built = build(
                config, self.model, self.num_tokens, self.groups, DTYPES[precision], device(), loss_chunk(),
                attending(precision, config.train.compile), self.lora,
            )  # fmt: skip
        self._fill(values)
        if config.train.compile:
            for module in self.built.module.modules():
                if isinstance(module, Block):
                    module.compile()

    def _initialize(self, config: EngineConfig) -> None:
        """Make the optimizer, and hand it and the model to DeepSpeed."""
        specs = {name: held.spec for name, held in self.built.held.items()}
        self.optimizer = build_optimizer(config.optimizer, self.built.trained, specs)
        with without_compiler():
            self.engine, *_ = deepspeed.initialize(
                model=self.built.module,
                optimizer=self.optimizer,
                config=deepspeed_config(config, self.dims),
                mpu=self._mpu,
            )
        if isinstance(self.engine.optimizer, BF16_Optimizer):
            # DeepSpeed would copy all fp32 gradients into one bucket and back; each by itself is reduced in place.
            reduce = self.engine.buffered_allreduce_fallback
            self.engine.buffered_allreduce_fallback = lambda grads=None, elements_per_buffer=0: reduce(grads, 0)
            if self.dims.replicas == 1:  # nothing to reduce, which DeepSpeed would do all the same
                self.engine.enable_backward_allreduce = False
                self.engine.pipeline_enable_backward_allreduce = False
        if self.pipelined and isinstance(self.engine.optimizer, DeepSpeedZeroOptimizer):
            self.engine.optimizer.scaled_global_norm = partial(norm_of_all_groups, self.engine.optimizer)
        if self.groups.position("tensor"):
            see_all_gradients(self.engine.optimizer, [parameter for _, parameter in self.built.trained])
        self.group_settings = self._settings()

    def _settings(self) -> list[dict[str, int | float]]:
        return [
            {key: value for key, value in group.items() if isinstance(value, int | float) and key != "lr"}
            for group in self.optimizer.param_groups
        ]

    def _own(self, config: EngineConfig, values: Values) -> None:
        """Find what this rank owns of the fp32 masters and the optimizer state, and give it its values."""
        named, zero = self.built.trained, self.engine.optimizer
        tensors = flats(zero, self.optimizer, named)
        owned = fragments(named, tensors, zero)
        sharing = Sharing(
            shapes={name: torch.Size(held.spec.shape) for name, held in self.built.held.items()},
            shards={name: held.shard for name, held in self.built.held.items()},
            replicas=self.groups.replicas if config.parallel.zero_stage else None,
            tensor=self.groups.tensor if self.dims.tensor > 1 else None,
        )
        prepare_state(self.optimizer, owned, tensors, values.optimizer_steps, sharing)
        first = dist.get_rank(self.groups.replicas) == 0
        first_tensor = self.groups.position("tensor") == 0
        self.pieces = optimizer_pieces(self.optimizer, owned, self.built.held, first, first_tensor)
        self.load(values)

    @torch.no_grad()
    def load(self, values: Values) -> None:
        """Give the fp32 masters and the optimizer state their values; each rank reads what it owns in threads.

        Host memory besides what is filled: 4 MiB a thread, twice that where shards are cut otherwise.
        """

        def fill(piece: Piece) -> None:
            with torch.no_grad():  # a thread's own setting
                values.fill(piece.values, piece.state, piece.name, piece.offset, piece.shard)

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(fill, self.pieces))
        if values.loss_scale is not None:
            restore_scaler(self._scaler, values.loss_scale)
        assert self._settings() == self.group_settings, "a load must leave the settings of the optimizer's groups alone"

    def restore(self, values: Values) -> None:
        """Take up other values in the middle of a run, as a new start from them would; every rank calls."""
        partitioned = any(is_partitioned(parameter) for _, parameter in self.built.named)
        if partitioned:
            self.engine.optimizer.checkpoint_event_prologue()  # small parameters are whole between steps
        self._fill(values)
        if partitioned:
            self.engine.optimizer.checkpoint_event_epilogue()
        set_optimizer_steps(self.optimizer, values.optimizer_steps)
        self.load(values)

    @property
    def _mpu(self) -> ModelParallelUnit | None:
        """How the plain engine learns the groups; the pipeline engine reads them from its module."""
        return None if self.pipelined else ModelParallelUnit(self.groups)

    @property
    def _scaler(self) -> Any:
        return getattr(self.engine.optimizer, "loss_scaler", None)

    def optimizer_state(self) -> dict[str, Any]:
        """What the optimizer needs to go on besides its pieces, and the settings of its groups."""
        return {
            "groups": self.group_settings,
            "steps": optimizer_steps(self.optimizer),
            "loss_scale": scaler_state(self._scaler),
        }

    def _partitioning(self, config: EngineConfig) -> Any:
        """Inside, ZeRO-3 cuts every layer as soon as it is made: a rank never holds more than its part and a layer.

        The type comes from the settings: told as an argument, DeepSpeed 0.19 takes bf16 for fp32 on CPUs.
        """
        settings = deepspeed_config(config, self.dims)
        return deepspeed.zero.Init(
            data_parallel_group=self.groups.replicas, config_dict_or_path=settings, mpu=self._mpu
        )

    @torch.no_grad()
    def _fill(self, values: Values) -> None:
        """Give the model its weights: each rank reads what it holds of each parameter."""
        for name, parameter in self.built.named:
            shard = self.built.held[name].shard
            if is_partitioned(parameter):
                offset, numel = own_range(parameter)
                part = parameter.ds_tensor  # type: ignore[attr-defined]
                values.fill(part[:numel], WEIGHT, name, offset, shard)
            else:
                values.fill(parameter.view(-1), WEIGHT, name, 0, shard)

    def tensors(self, batch: Batch, scale: float) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """This rank's part of a batch as (input_ids, (labels, loss_mask, scale)) on the device."""

        def put(array: np.ndarray) -> torch.Tensor:
            part = own_part(array, self.dims.context, self.groups.position("context"))
            return to_device(torch.from_numpy(np.ascontiguousarray(part)))

        scale_tensor = torch.full((), scale, dtype=torch.float32, device=self.engine.device)
        return put(batch.input_ids), (put(batch.labels), put(batch.loss_mask), scale_tensor)

    def _expect(self, num_micro_batches: int, sequence_length: int) -> None:
        """Make ready for so many micro-batches a step and rows of such a length."""
        if num_micro_batches != self.num_micro_batches:
            self.num_micro_batches = num_micro_batches
            self.engine.set_train_batch_size(num_micro_batches * self.micro_batch_size * self.dims.replicas)
            self.engine.micro_steps = 0  # it takes a multiple of the number for the last micro-batch of a step
            if hasattr(self.engine.optimizer, "gradient_accumulation_steps"):
                self.engine.optimizer.gradient_accumulation_steps = num_micro_batches  # it keeps the first number
        if self.pipelined and sequence_length != self.sequence_length:
            self.engine.reset_activation_shape()
        self.sequence_length = sequence_length

    @staticmethod
    def borders(batch: Batch) -> Borders | None:
        """The borders of a batch's documents; every rank of a replica needs those of the whole sequences."""
        return None if batch.documents is None else Borders.of(torch.from_numpy(batch.documents), to_device)

    def train_step(self, batches: list[Batch], lr: float, step: int) -> StepResult:
        """One optimizer step over this replica's micro-batches of a global batch.

        The loss is the sum over unmasked tokens over the global batch's count of them. DeepSpeed averages over
        micro-batches and replicas, so each micro-batch is scaled by their number.

        A loss that is not finite makes all its gradients so (see `vocabulary_loss`), and a gradient that is not makes
        the norm so, which every rank knows before any updates: ZeRO's optimizers then drop the gradients and go on.

        Args:
            batches: the micro-batches; their number and the length of their rows may differ from the last step's.
            lr: learning rate.
            step: number of the step, from 0; seeds dropout.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.built.counter.start_step(step)
        self._expect(len(batches), batches[0].input_ids.shape[1])
        self.built.documents.start(map(self.borders, batches))
        scale = len(batches) * self.dims.replicas / batches[0].num_loss_tokens
        feed = (self.tensors(batch, scale) for batch in batches)
        if self.pipelined:
            loss = self.engine.train_batch(data_iter=feed)
        else:
            loss = torch.zeros((), device=self.engine.device)
            for input_ids, labels in feed:
                micro_loss = self.built.loss(self.engine(input_ids), labels)
                self.engine.backward(micro_loss)
                if self.clips_itself and self.engine.is_gradient_accumulation_boundary():
                    limit = self.clip_grad_norm or float("inf")
                    grad_norm = torch.nn.utils.clip_grad_norm_(self.engine.module.parameters(), limit)
                    if not torch.isfinite(grad_norm):
                        self.engine.zero_grad()  # optimizers leave alone what has no gradient
                self.engine.step()
                loss += micro_loss.detach()
            dist.all_reduce(loss, group=self.groups.replicas)
            loss /= self.num_micro_batches * self.dims.replicas
        if not self.clips_itself:
            grad_norm = self.engine.get_global_grad_norm()
        norm = float(grad_norm)
        skipped = not 0.0 <= norm < math.inf
        assert self.clips_itself or self.engine.was_step_applied() is not skipped, f"an update by a norm of {norm}"
        if skipped:
            drop_gradients(self.engine.optimizer)
        return StepResult(float(loss), norm, skipped)

    def evaluate(self, heldout: HeldoutWindows) -> float:
        """Negative log-likelihood of a held-out set in nats, summed over its unmasked tokens."""
        per_round = self.micro_batch_size * self.dims.data
        rounds = -(-heldout.num_windows // per_round)

        def batches() -> Iterator[Batch]:
            for index in range(rounds):
                start = (index * self.dims.data + self.data_rank) * self.micro_batch_size
                yield heldout.windows(start, self.micro_batch_size)

        self._expect(self.num_micro_batches, heldout.sequence_length)
        self.built.documents.start(map(self.borders, batches()))  # by itself: the stages between draw from no feed
        feed = (self.tensors(batch, 1.0) for batch in batches())
        if self.pipelined:
            mean = self.engine.eval_batch(feed, num_micro_batches=rounds)
            return float(mean) * rounds * self.dims.data
        self.engine.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        with torch.no_grad():
            for input_ids, labels in feed:
                total += self.built.loss(self.engine(input_ids), labels)
        self.engine.train()
        dist.all_reduce(total, group=self.groups.replicas)
        return float(total)
