"""Values that every rank can make for itself, and a rank's part of them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from megakor.model.specs import Shard

Tensors = dict[str, torch.Tensor]


def value(name: str, *shape: int) -> torch.Tensor:
    """Random numbers that depend on the name alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


@dataclass(frozen=True)
class Piece:
    """Which part of whole tensors a tensor rank has; the default is a process with everything."""

    index: int = 0
    size: int = 1
    sequence_parallel: bool = False

    def of(self, whole: torch.Tensor, place: str | int | None) -> torch.Tensor:
        """The rank's part of hidden states, by where they are, or of a parameter, by its sharded dimension."""
        dim = self.dim(place) if isinstance(place, str) else place
        return whole if dim is None else Shard(dim, self.index, self.size).of(whole)

    def dim(self, place: str) -> int | None:
        """The dimension along which [batch, seq, features] are cut."""
        return {"residual": 1 if self.sequence_parallel else None, "columns": 2, "ids": None}[place]
