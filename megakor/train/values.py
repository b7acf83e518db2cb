"""Where the values of a run's first step come from: a seed, a checkpoint, or adapters beside a frozen base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from megakor.checkpoint.format import WEIGHT
from megakor.config.schema import LoraConfig, ModelConfig
from megakor.model.lora import adapter_specs, is_adapter
from megakor.model.parameters import initial_value
from megakor.model.specs import WHOLE, Shard, parameter_specs


class Values(Protocol):
    """Where a model's values come from: a seed, or a checkpoint."""

    def fill(self, out: torch.Tensor, state: str, name: str, start: int, shard: Shard = WHOLE) -> None:
        """Fill `out`, 1-D, with elements from `start` on of a flattened state tensor or of a shard of it.

        Threads call it at once, with other tensors.
        """

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer state has behind it; 0: there is none, and moments start at zero."""

    @property
    def loss_scale(self) -> dict[str, float] | None:
        """State of the dynamic loss scale; None: it starts afresh."""


@dataclass
class SeededValues:
    """A fresh model, or fresh adapters of it: every parameter from the seed and its canonical name."""

    model: ModelConfig
    seed: int
    lora: LoraConfig | None = None
    optimizer_steps: int = 0
    loss_scale: dict[str, float] | None = None

    def fill(self, out: torch.Tensor, state: str, name: str, start: int, shard: Shard = WHOLE) -> None:
        if state != WEIGHT:
            out.zero_()
            return
        adapters = adapter_specs(self.model, self.lora) if self.lora is not None else []
        spec = next(spec for spec in (*parameter_specs(self.model), *adapters) if spec.name == name)
        out.copy_(shard.of(initial_value(spec, self.seed)).flatten()[start : start + out.numel()])


@dataclass
class AdaptedValues:
    """A frozen base with adapters: weights from the one, adapters and their optimizer state from the other."""

    base: Values
    adapters: Values

    def fill(self, out: torch.Tensor, state: str, name: str, start: int, shard: Shard = WHOLE) -> None:
        (self.adapters if is_adapter(name) else self.base).fill(out, state, name, start, shard)

    @property
    def optimizer_steps(self) -> int:
        return self.adapters.optimizer_steps

    @property
    def loss_scale(self) -> dict[str, float] | None:
        return self.adapters.loss_scale
