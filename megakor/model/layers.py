"""The layers that a model is made of, and the factory through which the model asks for them.

The factory decides what a rank holds of each layer: `WholeLayers` makes whole ones for one rank,
`megakor.parallel.layers.ShardedLayers` a tensor rank's shards. The model itself does not know.

Weights are allocated without values: a parameter's initial value depends on the seed and its canonical name alone
(`megakor.model.specs`), so a layer that filled its own weights would only be overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

Attend = Callable[[torch.Tensor], torch.Tensor]
"""Attention over whole sequences: fused [batch, seq, heads, 3 × head_dim] -> [batch, seq, heads, head_dim]."""


class Linear(nn.Linear):
    """`nn.Linear` whose values come from `initialize_parameters`, and which may have an adapter (`megakor.model.lora`).

    Attributes:
        product: computes it; a layout that takes weights apart between passes sets its own.
        lora_scale: what the adapter's output counts; None: there is no adapter.
    """

    product = staticmethod(functional.linear)
    lora_scale: float | None = None
    lora_A: nn.Linear
    lora_B: nn.Linear

    def reset_parameters(self) -> None:
        pass

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.lora_scale is None:
            return self.multiply(hidden_states)
        return self.multiply(hidden_states) + self.lora_scale * self.lora_B(self.lora_A(hidden_states))

    def multiply(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The linear by itself."""
        return self.product(hidden_states, self.weight, self.bias)


class Embedding(nn.Embedding):
    """`nn.Embedding` whose values come from `initialize_parameters`, and which can project back onto its rows.

    Attributes:
        product: computes the projection, as in `Linear`.
    """

    product = staticmethod(functional.linear)

    def reset_parameters(self) -> None:
        pass

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [batch, seq, rows] from the embedding's own rows, for tied embeddings."""
        return self.product(hidden_states, self.weight)


class Norm(nn.LayerNorm):
    """`nn.LayerNorm` whose values come from `initialize_parameters`."""

    def reset_parameters(self) -> None:
        pass


class Layers(Protocol):
    """What a model asks for its layers.

    Hidden states of the residual stream are [batch, seq of this rank, hidden]. Column linears split their output over
    tensor ranks, row linears their input, so the output of a row linear is a partial sum until it is joined.
    """

    def embedding(self, num_rows: int, size: int) -> Embedding: ...

    def norm(self, size: int, eps: float) -> nn.LayerNorm: ...

    def column(self, in_features: int, out_features: int, bias: bool) -> nn.Linear: ...

    def row(self, in_features: int, out_features: int, bias: bool) -> nn.Linear: ...

    def adapters(self, layer: nn.Linear, rank: int) -> tuple[nn.Linear, nn.Linear]:
        """Linears A and B whose product goes from where the layer's input is to where its output is."""

    def join(self, partial: torch.Tensor, *rows: nn.Linear) -> torch.Tensor:
        """The sum of the outputs of `rows`, biases included, from this rank's sum of their partial outputs."""

    def attend(self, attend: Attend, fused: torch.Tensor) -> torch.Tensor:
        """`attend` over the whole sequences, from and to this rank's part of them."""


@dataclass(frozen=True)
class WholeLayers:
    """The default factory: whole layers on one rank."""

    dtype: torch.dtype = torch.float32
    device: torch.device | None = None

    def embedding(self, num_rows: int, size: int) -> Embedding:
        return Embedding(num_rows, size, dtype=self.dtype, device=self.device)

    def norm(self, size: int, eps: float) -> nn.LayerNorm:
        return Norm(size, eps=eps, dtype=self.dtype, device=self.device)

    def column(self, in_features: int, out_features: int, bias: bool) -> nn.Linear:
        return Linear(in_features, out_features, bias=bias, dtype=self.dtype, device=self.device)

    def row(self, in_features: int, out_features: int, bias: bool) -> nn.Linear:
        return Linear(in_features, out_features, bias=bias, dtype=self.dtype, device=self.device)

    def adapters(self, layer: nn.Linear, rank: int) -> tuple[nn.Linear, nn.Linear]:
        return self.column(layer.in_features, rank, bias=False), self.row(rank, layer.out_features, bias=False)

    def join(self, partial: torch.Tensor, *rows: nn.Linear) -> torch.Tensor:
        return partial  # whole row linears have added their biases

    def attend(self, attend: Attend, fused: torch.Tensor) -> torch.Tensor:
        return attend(fused)


def rotary_tables(length: int, rotary_dim: int, base: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the rotary angles, fp32, each [length, rotary_dim] (RoFormer, Su et al. 2021, eq. 34)."""
    exponents = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32) / rotary_dim
    positions = torch.arange(length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, 1.0 / (base**exponents))  # [length, rotary_dim / 2]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first `cos.shape[-1]` dimensions of [batch, heads, seq, head_dim]; the rest pass unchanged."""
    rotary_dim = cos.shape[-1]
    rotating, passing = states[..., :rotary_dim], states[..., rotary_dim:]
    first, second = rotating.chunk(2, dim=-1)
    rotated = rotating * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, passing), dim=-1)
