"""The engine of a run: DeepSpeed's plain or pipeline engine behind one `train_step` and one `evaluate`.

This module and `megakor.checkpoint` are the only ones that talk to DeepSpeed's engines. Every method here is called
by every rank.

    module ─► initial values by name ─► deepspeed.initialize ─► fp32 masters and moments by name ─► steps
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import nn

from megakor.config.schema import EngineConfig, ModelConfig, Precision
from megakor.data.stream import Batch
from megakor.model.gpt_neox import Block
from megakor.model.parameters import WHOLE, Shard, parameter_specs
from megakor.parallel.build import Built, build
from megakor.parallel.context import own_part
from megakor.parallel.dims import ParallelDims
from megakor.parallel.groups import Groups, ModelParallelUnit
from megakor.train.adafactor import Sharing
from megakor.train.device import DTYPES, HOST, device, is_cpu, loss_chunk, to_device
from megakor.train.fragments import flats, fragments, is_partitioned, own_range
from megakor.train.loss_scale import restore_scaler, scaler_state
from megakor.train.optimizer import Piece, build_optimizer, optimizer_pieces, optimizer_steps, prepare_state


class Values(Protocol):
    """Where a model's values come from: a seed, or a checkpoint."""

    def weight(self, name: str, start: int, stop: int, shard: Shard = WHOLE) -> torch.Tensor:
        """Elements of a flattened fp32 parameter or of a shard of it."""

    def state(self, state: str, name: str, start: int, stop: int, shard: Shard = WHOLE) -> torch.Tensor:
        """Elements of a flattened optimizer state or of a shard of it."""

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
    cache: tuple[str, Shard, torch.Tensor] = field(default=("", WHOLE, torch.empty(0)))

    def weight(self, name: str, start: int, stop: int, shard: Shard = WHOLE) -> torch.Tensor:
        if self.cache[:2] != (name, shard):
            spec = next(spec for spec in parameter_specs(self.model) if spec.name == name)
            self.cache = (name, shard, shard.of(spec.initial_value(self.seed)).flatten())
        return self.cache[2][start:stop]

    def state(self, state: str, name: str, start: int, stop: int, shard: Shard = WHOLE) -> torch.Tensor:
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
    zero.setdefault("memory_efficient_linear", False)  # it would replace torch's linear for the whole process
    if config.parallel.offload_optimizer:
        zero.setdefault("offload_optimizer", {"device": HOST})
    if config.parallel.offload_parameters:
        zero.setdefault("offload_param", {"device": HOST})
    return {
        "steps_per_print": 1_000_000_000,
        "zero_allow_untested_optimizer": True,  # Adafactor is ours, and knows its fragments
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW updates offloaded weights as fast, uncompiled
        **config.deepspeed,
        # DeepSpeed counts the ranks that split a sequence as replicas, which they are for parameters.
        "train_batch_size": train.global_batch_size * dims.context,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // (train.micro_batch_size * dims.data),
        "gradient_clipping": train.clip_grad_norm if config.parallel.zero_stage else 0.0,  # ZeRO-0: by train_step
        "bf16": {"enabled": train.precision is Precision.bf16, "immediate_grad_update": True},
        "fp16": {"enabled": train.precision is Precision.fp16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        # Its cuts would corrupt activations that are split along the sequence already.
        "pipeline": {**config.deepspeed.get("pipeline", {}), "pipe_partitioned": False, "grad_partitioned": False},
    }


def check_batches(config: EngineConfig, dims: ParallelDims) -> None:
    """Raise where the global batch does not divide among the replicas."""
    unit = config.train.micro_batch_size * dims.data
    if config.train.global_batch_size % unit:
        raise ValueError(
            f"train.global_batch_size={config.train.global_batch_size} must be divisible by "
            f"train.micro_batch_size × data parallel size = {config.train.micro_batch_size} × {dims.data}"
        )


class Engine:
    """A model in training on this rank.

    Args:
        config: the run.
        model: the architecture, `vocab_size` resolved.
        num_tokens: the true vocabulary.
        dims: the layout.
        values: where weights and optimizer state come from.
    """

    built: Built
    engine: Any
    """DeepSpeed's."""

    def __init__(
        self, config: EngineConfig, model: ModelConfig, num_tokens: int, dims: ParallelDims, values: Values
    ) -> None:
        check_batches(config, dims)
        self.dims, self.model, self.num_tokens = dims, model, num_tokens
        self.groups = Groups.create(dims)
        self.data_rank = self.groups.position("data")
        self.num_micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * dims.data)
        self.micro_batch_size = config.train.micro_batch_size
        self.pipelined = dims.pipeline > 1
        self.clip_grad_norm = config.train.clip_grad_norm
        self.clips_itself = config.parallel.zero_stage == 0  # DeepSpeed then tells no norm unless it clips
        settings = deepspeed_config(config, dims)
        mpu = None if self.pipelined else ModelParallelUnit(self.groups)
        partitioned = config.parallel.zero_stage == 3
        dtype = DTYPES[config.train.precision]
        with self._partitioning(settings, mpu) if partitioned else nullcontext():
            self.built = build(config, model, num_tokens, self.groups, dtype, device(), loss_chunk())
        named = self.built.named
        self._fill(named, values)
        if config.train.compile:
            for module in self.built.module.modules():
                if isinstance(module, Block):
                    module.compile()
        specs = {name: held.spec for name, held in self.built.held.items()}
        self.optimizer = build_optimizer(config.optimizer, named, specs)
        self.engine, *_ = deepspeed.initialize(
            model=self.built.module, optimizer=self.optimizer, config=settings, mpu=mpu
        )
        if dims.replicas == 1 and isinstance(self.engine.optimizer, BF16_Optimizer):
            # One replica: DeepSpeed's bf16 optimizer would flatten, "reduce" and copy back every fp32 gradient.
            self.engine.enable_backward_allreduce = False
            self.engine.pipeline_enable_backward_allreduce = False
        self.group_settings = [
            {key: value for key, value in group.items() if isinstance(value, int | float) and key != "lr"}
            for group in self.optimizer.param_groups
        ]
        zero = self.engine.optimizer
        tensors = flats(zero, self.optimizer, named)
        owned = fragments(named, tensors, zero)
        sharing = Sharing(
            shapes={name: torch.Size(held.spec.shape) for name, held in self.built.held.items()},
            shards={name: held.shard for name, held in self.built.held.items()},
            replicas=self.groups.replicas if config.parallel.zero_stage else None,
            tensor=self.groups.tensor if dims.tensor > 1 else None,
        )
        prepare_state(self.optimizer, owned, tensors, values.optimizer_steps, sharing)
        first = dist.get_rank(self.groups.replicas) == 0
        first_tensor = self.groups.position("tensor") == 0
        self.pieces: list[Piece] = optimizer_pieces(self.optimizer, owned, self.built.held, first, first_tensor)
        with torch.no_grad():
            for piece in self.pieces:
                read = partial(values.weight, piece.name) if piece.state == "weight" else partial(
                    values.state, piece.state, piece.name
                )  # fmt: skip
                piece.values.copy_(read(piece.offset, piece.offset + piece.values.numel(), piece.shard))
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

    def _partitioning(self, settings: dict[str, Any], mpu: Any) -> Any:
        """Inside, ZeRO-3 cuts every layer as soon as it is made: a rank never holds more than its part and a layer.

        The type comes from `settings`: told as an argument, DeepSpeed 0.19 takes bf16 for fp32 on CPUs.
        """
        return deepspeed.zero.Init(data_parallel_group=self.groups.replicas, config_dict_or_path=settings, mpu=mpu)

    @torch.no_grad()
    def _fill(self, named: list[tuple[str, nn.Parameter]], values: Values) -> None:
        """Give the model its weights: each rank reads what it holds of each parameter."""
        for name, parameter in named:
            shard = self.built.held[name].shard
            if is_partitioned(parameter):
                offset, numel = own_range(parameter)
                part = parameter.ds_tensor  # type: ignore[attr-defined]
                part[:numel].copy_(values.weight(name, offset, offset + numel, shard))
            else:
                weight = values.weight(name, 0, parameter.numel(), shard)
                parameter.copy_(weight.view(parameter.shape))

    def tensors(self, batch: Batch, scale: float) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """This rank's part of a batch as (input_ids, (labels, loss_mask, scale)) on the device."""

        def put(array: np.ndarray) -> torch.Tensor:
            part = own_part(array, self.dims.context, self.groups.position("context"))
            return to_device(torch.from_numpy(np.ascontiguousarray(part)))

        scale_tensor = torch.full((), scale, dtype=torch.float32, device=self.engine.device)
        return put(batch.input_ids), (put(batch.labels), put(batch.loss_mask), scale_tensor)

    def train_step(self, batches: list[Batch], lr: float, step: int) -> StepResult:
        """One optimizer step over this replica's micro-batches of a global batch.

        The loss is the sum over unmasked tokens over the global batch's count of them. DeepSpeed averages over
        micro-batches and replicas, so each micro-batch is scaled by their number.

        Args:
            batches: the micro-batches.
            lr: learning rate.
            step: number of the step, from 0; seeds dropout.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.built.counter.start_step(step)
        scale = self.num_micro_batches * self.dims.replicas / batches[0].num_loss_tokens
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
                self.engine.step()
                loss += micro_loss.detach()
            dist.all_reduce(loss, group=self.groups.replicas)
            loss /= self.num_micro_batches * self.dims.replicas
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
                yield self.tensors(heldout.windows(start, self.micro_batch_size), 1.0)

        if self.pipelined:
            mean = self.engine.eval_batch(feed(), num_micro_batches=rounds)
            return float(mean) * rounds * self.dims.data
        self.engine.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        with torch.no_grad():
            for input_ids, labels in feed():
                total += self.built.loss(self.engine(input_ids), labels)
        self.engine.train()
        dist.all_reduce(total, group=self.groups.replicas)
        return float(total)
