"""The engine of a run: DeepSpeed's plain or pipeline engine behind one `train_step` and one `evaluate`.

This module and `megakor.checkpoint` are the only ones that talk to DeepSpeed's engines. Every method here is called
by every rank.

    module ─► initial values by name ─► deepspeed.initialize ─► fp32 masters and moments by name ─► steps
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from megakor.config.schema import EngineConfig, ModelConfig, Precision
from megakor.data.stream import Batch
from megakor.model.gpt_neox import GPTNeoXForCausalLM
from megakor.model.layers import WholeLinears
from megakor.model.loss import masked_loss
from megakor.model.parameters import parameter_specs
from megakor.parallel.dims import ParallelDims
from megakor.parallel.pipeline import GPTNeoXPipeline
from megakor.train.device import device, is_cpu
from megakor.train.fragments import fragments
from megakor.train.loss_scale import restore_scaler, scaler_state
from megakor.train.optimizer import Piece, build_optimizer, optimizer_pieces, optimizer_steps, prepare_state

MOVING = ("lr", "num_updates")
"""Entries of an optimizer's parameter group that change as it runs; the others are settings."""


class Values(Protocol):
    """Where a model's values come from: a seed, or a checkpoint."""

    def weight(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements of a flattened fp32 parameter."""

    def state(self, state: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements of a flattened optimizer state."""

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer state has behind it; 0: there is none, and moments start at zero."""

    @property
    def loss_scale(self) -> dict[str, float] | None:
        """State of the dynamic loss scale; None: it starts afresh."""


@dataclass
class SeededValues:
    """A fresh model: every parameter from the seed and its canonical name."""

    model: ModelConfig
    seed: int
    optimizer_steps: int = 0
    loss_scale: dict[str, float] | None = None
    cache: tuple[str, torch.Tensor] = field(default=("", torch.empty(0)))

    def weight(self, name: str, start: int, stop: int) -> torch.Tensor:
        if self.cache[0] != name:
            spec = next(spec for spec in parameter_specs(self.model) if spec.name == name)
            self.cache = (name, spec.initial_value(self.seed).view(-1))
        return self.cache[1][start:stop]

    def state(self, state: str, name: str, start: int, stop: int) -> torch.Tensor:
        return torch.zeros(stop - start)


@dataclass(frozen=True)
class StepResult:
    """What a step tells: loss in nats per unmasked token of the global batch, and the gradient norm before clipping."""

    loss: float
    grad_norm: float


class HeldoutWindows(Protocol):
    """A held-out set, cut into windows."""

    num_windows: int

    def windows(self, start: int, count: int) -> Batch: ...


def deepspeed_config(config: EngineConfig, dims: ParallelDims) -> dict[str, Any]:
    """DeepSpeed's configuration: the pass-through section, and over it the keys that megakor owns."""
    train = config.train
    zero: dict[str, Any] = {**config.deepspeed.get("zero_optimization", {}), "stage": config.parallel.zero_stage}
    if is_cpu():
        zero.setdefault("contiguous_gradients", False)  # a copy of every gradient, against fragmented GPU memory
    return {
        "steps_per_print": 1_000_000_000,
        "zero_allow_untested_optimizer": True,  # Adafactor is ours, and knows its fragments
        **config.deepspeed,
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (train.micro_batch_size * dims.data),
        "gradient_clipping": train.clip_grad_norm if config.parallel.zero_stage else 0.0,  # ZeRO-0: by train_step
        "bf16": {"enabled": train.precision is Precision.bf16, "immediate_grad_update": True},
        "fp16": {"enabled": train.precision is Precision.fp16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
    }


def check_batches(config: EngineConfig, dims: ParallelDims) -> None:
    """Raise where the global batch does not divide among the replicas."""
    unit = config.train.micro_batch_size * dims.data
    if config.train.global_batch_size % unit:
        raise ValueError(
            f"train.global_batch_size={config.train.global_batch_size} must be divisible by "
            f"train.micro_batch_size × data parallel size = {config.train.micro_batch_size} × {dims.data}"
        )


def tensors(batch: Batch, scale: float, place: torch.device) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """A batch as (input_ids, (labels, loss_mask, scale)) on the device."""

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(place, non_blocking=True)

    scale_tensor = torch.tensor(scale, dtype=torch.float32, device=place)
    return put(batch.input_ids), (put(batch.labels), put(batch.loss_mask), scale_tensor)


class Engine:
    """A model in training on this rank.

    Args:
        config: the run.
        model: the architecture, `vocab_size` resolved.
        num_tokens: the true vocabulary.
        dims: the layout.
        values: where weights and optimizer state come from.
    """

    def __init__(
        self, config: EngineConfig, model: ModelConfig, num_tokens: int, dims: ParallelDims, values: Values
    ) -> None:
        check_batches(config, dims)
        self.dims, self.model, self.num_tokens = dims, model, num_tokens
        self.data_rank = dims.data_rank(dist.get_rank())
        self.num_micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * dims.data)
        self.micro_batch_size = config.train.micro_batch_size
        self.loss_fn: Callable[..., torch.Tensor] = partial(self._loss, num_tokens=num_tokens)
        self.pipelined = dims.pipeline > 1
        self.clip_grad_norm = config.train.clip_grad_norm
        self.clips_itself = config.parallel.zero_stage == 0  # DeepSpeed then tells no norm unless it clips
        module: nn.Module
        if self.pipelined:
            partition = config.parallel.pipeline_partition
            module = GPTNeoXPipeline(model, WholeLinears(), dims, partition, self.loss_fn)
            named = list(module.canonical_parameters())
        else:
            module = GPTNeoXForCausalLM(model)
            named = list(module.named_parameters())
        shapes = {name: parameter.shape for name, parameter in named}
        with torch.no_grad():
            for name, parameter in named:
                parameter.copy_(values.weight(name, 0, parameter.numel()).view(parameter.shape))
        specs = {spec.name: spec for spec in parameter_specs(model)}
        self.optimizer = build_optimizer(config.optimizer, named, specs)
        settings = deepspeed_config(config, dims)
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=settings)
        if dims.data == 1 and config.parallel.zero_stage == 1 and config.train.precision is Precision.bf16:
            # One replica: DeepSpeed's bf16 optimizer would flatten, "reduce" and copy back every fp32 gradient.
            self.engine.enable_backward_allreduce = False
            self.engine.pipeline_enable_backward_allreduce = False
        self.group_settings = [
            {key: value for key, value in group.items() if isinstance(value, int | float) and key not in MOVING}
            for group in self.optimizer.param_groups
        ]
        owned = fragments(named, self.optimizer.param_groups)
        group = self._data_group() if config.parallel.zero_stage > 0 else None
        prepare_state(self.optimizer, owned, shapes, group, device(), values.optimizer_steps)
        replicated = {name for name, parameter in named if getattr(parameter, "ds_pipe_replicated", False)}
        self.pieces: list[Piece] = optimizer_pieces(self.optimizer, owned, self.data_rank == 0, replicated)
        with torch.no_grad():
            for piece in self.pieces:
                read = partial(values.weight, piece.name) if piece.state == "weight" else partial(
                    values.state, piece.state, piece.name
                )  # fmt: skip
                piece.values.copy_(read(piece.offset, piece.offset + piece.values.numel()))
        if values.loss_scale is not None:
            restore_scaler(self._scaler, values.loss_scale)

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

    def _data_group(self) -> dist.ProcessGroup:
        if self.pipelined:
            return self.engine.grid.get_data_parallel_group()
        return dist.group.WORLD  # type: ignore[return-value]

    @staticmethod
    def _loss(logits: torch.Tensor, labels: tuple[torch.Tensor, ...], num_tokens: int) -> torch.Tensor:
        targets, loss_mask, scale = labels
        return masked_loss(logits, targets, loss_mask, scale, num_tokens)

    def train_step(self, batches: list[Batch], lr: float) -> StepResult:
        """One optimizer step over this replica's micro-batches of a global batch.

        The loss is the sum over unmasked tokens over the global batch's count of them. DeepSpeed averages over
        micro-batches and replicas, so each micro-batch is scaled by their number.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        scale = self.num_micro_batches * self.dims.data / batches[0].num_loss_tokens
        feed = (tensors(batch, scale, self.engine.device) for batch in batches)
        if self.pipelined:
            loss = self.engine.train_batch(data_iter=feed)
        else:
            loss = torch.zeros((), device=self.engine.device)
            for input_ids, labels in feed:
                micro_loss = self.loss_fn(self.engine(input_ids), labels)
                self.engine.backward(micro_loss)
                if self.clips_itself and self.engine.is_gradient_accumulation_boundary():
                    limit = self.clip_grad_norm or float("inf")
                    grad_norm = torch.nn.utils.clip_grad_norm_(self.engine.module.parameters(), limit)
                self.engine.step()
                loss += micro_loss.detach()
            dist.all_reduce(loss)
            loss /= self.num_micro_batches * self.dims.data
        if not self.clips_itself:
            grad_norm = self.engine.get_global_grad_norm()
        return StepResult(loss=float(loss), grad_norm=float(grad_norm))

    def evaluate(self, heldout: HeldoutWindows) -> float:
        """Negative log-likelihood of a held-out set in nats, summed over its unmasked tokens."""
        per_round = self.micro_batch_size * self.dims.data
        rounds = -(-heldout.num_windows // per_round)

        def feed() -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
            for index in range(rounds):
                start = (index * self.dims.data + self.data_rank) * self.micro_batch_size
                yield tensors(heldout.windows(start, self.micro_batch_size), 1.0, self.engine.device)

        if self.pipelined:
            mean = self.engine.eval_batch(feed(), num_micro_batches=rounds)
            return float(mean) * rounds * self.dims.data
        self.engine.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        with torch.no_grad():
            for input_ids, labels in feed():
                total += self.loss_fn(self.engine(input_ids), labels)
        self.engine.train()
        dist.all_reduce(total)
        return float(total)
