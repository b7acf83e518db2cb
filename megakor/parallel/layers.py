"""The factory of the layers that a rank holds, in every layout.

Column and row linears, embeddings and norms are those of `megakor.parallel.tensor` where tensor ranks share the work.

An adapter (`megakor.model.lora`) is laid out as its linear is. A column's A works on this rank's part of the residual
stream, and its B is a column linear from there on: what is gathered is [batch, seq, rank]. A row's A has a part of the
features, so A x is a partial sum. B is linear: B applied to it is a partial sum of the output, which `join` adds up
with the row's own, and no collective is added but for the sum of B's gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from megakor.model.layers import Attend, Embedding, Linear
from megakor.parallel.context import exchange
from megakor.parallel.groups import Groups
from megakor.parallel.tensor import (
    ColumnLinear,
    ResidualNorm,
    RowLinear,
    SharedLinear,
    TensorRegion,
    VocabularyEmbedding,
    gathered_linear,
)

AnyLayer = TypeVar("AnyLayer", Linear, Embedding)


@dataclass(frozen=True)
class ShardedLayers:
    """The factory of a rank's shards; serves every layout, `WholeLayers` those without tensor and context ranks.

    Attributes:
        gathered: whether weights are whole in the passes alone (ZeRO-3).
    """

    groups: Groups
    dtype: torch.dtype
    device: torch.device | None = None
    gathered: bool = False

    @property
    def region(self) -> TensorRegion:
        return TensorRegion(self.groups.tensor, self.groups.dims.sequence_parallel)

    @property
    def size(self) -> int:
        return self.groups.dims.tensor

    def embedding(self, num_rows: int, size: int) -> Embedding:
        if self.size == 1:
            return self.made(Embedding(num_rows, size, dtype=self.dtype, device=self.device))
        layer = VocabularyEmbedding(num_rows // self.size, size, dtype=self.dtype, device=self.device)
        layer.region, layer.first = self.region, self.groups.position("tensor") * (num_rows // self.size)
        return self.made(layer)

    def norm(self, size: int, eps: float) -> nn.LayerNorm:
        layer = ResidualNorm(size, eps=eps, dtype=self.dtype, device=self.device)
        layer.region = self.region
        return layer

    def column(self, in_features: int, out_features: int, bias: bool) -> nn.Linear:
        options: dict[str, Any] = {"bias": bias, "dtype": self.dtype, "device": self.device}
        if self.size == 1:
            return self.made(Linear(in_features, out_features, **options))
        layer = ColumnLinear(in_features, out_features // self.size, **options)
        layer.region = self.region
        return self.made(layer)

    def row(self, in_features: int, out_features: int, bias: bool) -> nn.Linear:
        kind = Linear if self.size == 1 else RowLinear
        return self.made(kind(in_features // self.size, out_features, bias=bias, dtype=self.dtype, device=self.device))

    def adapters(self, layer: nn.Linear, rank: int) -> tuple[nn.Linear, nn.Linear]:
        if isinstance(layer, ColumnLinear):
            down = self.shared if self.region.sequence_parallel else self.whole
            return down(layer.in_features, rank), self.column(rank, self.size * layer.out_features, bias=False)
        up = self.shared if isinstance(layer, RowLinear) else self.whole
        return self.whole(layer.in_features, rank), up(rank, layer.out_features)

    def whole(self, in_features: int, out_features: int) -> Linear:
        """A linear that no collective has a part in."""
        return self.made(Linear(in_features, out_features, bias=False, dtype=self.dtype, device=self.device))

    def shared(self, in_features: int, out_features: int) -> Linear:
        layer = SharedLinear(in_features, out_features, bias=False, dtype=self.dtype, device=self.device)
        layer.region = self.region
        return self.made(layer)

    def made(self, layer: AnyLayer) -> AnyLayer:
        """The layer, its product as the weights need it."""
        if self.gathered:
            layer.product = gathered_linear  # type: ignore[assignment]
        return layer

    def join(self, partial: torch.Tensor, *rows: nn.Linear) -> torch.Tensor:
        if self.size == 1:
            return partial
        joined = self.region.leave(partial)
        biases = [row.bias for row in rows if row.bias is not None]
        for bias in self.region.residual_parameters(*biases) if biases else ():
            joined = joined + bias
        return joined

    def attend(self, attend: Attend, fused: torch.Tensor) -> torch.Tensor:
        if self.groups.dims.context == 1:
            return attend(fused)
        group = self.groups.context
        return exchange(attend(exchange(fused, group, to_heads=True)), group, to_heads=False)
