"""The layers that a model is made of, and the factory through which blocks ask for their linears.

Weights are allocated without values: a parameter's initial value depends on the seed and its canonical name alone
(`megakor.model.parameters`), so a layer that filled its own weights would only be overwritten.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn


class Linear(nn.Linear):
    """`nn.Linear` whose values come from `initialize_parameters`."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """`nn.Embedding` whose values come from `initialize_parameters`."""

    def reset_parameters(self) -> None:
        pass


class Linears(Protocol):
    """What a block asks for its linears: column linears split their output over ranks, row linears their input."""

    def column(self, in_features: int, out_features: int, bias: bool) -> nn.Module: ...

    def row(self, in_features: int, out_features: int, bias: bool) -> nn.Module: ...


class WholeLinears:
    """The default factory: whole linears on one rank."""

    def column(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        return Linear(in_features, out_features, bias=bias)

    def row(self, in_features: int, out_features: int, bias: bool) -> nn.Module:
        return Linear(in_features, out_features, bias=bias)


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
