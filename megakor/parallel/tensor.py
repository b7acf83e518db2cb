"""Tensor and sequence parallelism: a tensor rank's shards of the layers, and the collectives between them.

Megatron-LM's scheme (Shoeybi et al. 2019; Korthikanti et al. 2022). Column linears split their output features, row
linears their input features; a row linear's output is a partial sum, which `join` adds up. Without sequence
parallelism every tensor rank holds the whole residual stream:

    column: nothing forward, all-reduce backward          join: all-reduce forward, nothing backward

With it, each rank holds its part of the sequence, norms and dropout work on that part, and

    column: all-gather forward, reduce-scatter backward          join: reduce-scatter forward, all-gather backward

The gathered input of a column linear is not kept: the backward pass gathers it again. Norms and row biases see a part
of the tokens only, so their gradients are summed over the tensor ranks, in an identity around the parameter. Dimension
1 of hidden states is the sequence.

An adapter (`megakor.model.lora`) is laid out as its linear is. A column's A works on this rank's part of the residual
stream, and its B is a column linear from there on: what is gathered is [batch, seq, rank]. A row's A has a part of the
features, so A x is a partial sum. B is linear: B applied to it is a partial sum of the output, which `join` adds up
with the row's own, and no collective is added but for the sum of B's gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3
from torch import nn
from torch.nn import functional

from megakor.model.layers import Attend, Embedding, Linear, Norm
from megakor.parallel.context import exchange
from megakor.parallel.groups import Groups

AnyLayer = TypeVar("AnyLayer", Linear, Embedding)


Waiting = Callable[[], torch.Tensor]
"""Ends a collective that was started, and returns its result."""


def start_sum(partial: torch.Tensor, group: dist.ProcessGroup) -> Waiting:
    """Start to add up a tensor over the group, in place."""
    work = dist.all_reduce(partial, group=group, async_op=True)

    def wait() -> torch.Tensor:
        work.wait()
        return partial

    return wait


def start_gathering(part: torch.Tensor, group: dist.ProcessGroup) -> Waiting:
    """Start [batch, seq / size, …] of each rank -> [batch, seq, …]."""
    size = dist.get_world_size(group)
    batch, length, *rest = part.shape
    parts = part.new_empty((size * batch, length, *rest))
    work = dist.all_gather_into_tensor(parts, part.contiguous(), group=group, async_op=True)

    def wait() -> torch.Tensor:
        work.wait()
        return parts.unflatten(0, (size, batch)).transpose(0, 1).reshape(batch, size * length, *rest)

    return wait


def start_scattering(partial: torch.Tensor, group: dist.ProcessGroup) -> Waiting:
    """Start [batch, seq, …] partial sums -> this rank's part of their sum over the group, [batch, seq / size, …]."""
    size = dist.get_world_size(group)
    parts = partial.unflatten(1, (size, -1)).transpose(0, 1).contiguous()  # [size, batch, seq / size, …]
    part = torch.empty_like(parts[0])
    work = dist.reduce_scatter_tensor(part, parts.flatten(0, 1), group=group, async_op=True)

    def wait() -> torch.Tensor:
        work.wait()
        return part

    return wait


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return start_sum(partial.clone(memory_format=torch.contiguous_format), group)()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return start_scattering(partial, group)()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return start_gathering(gradient, ctx.group)(), None


class _SumGradients(torch.autograd.Function):
    """Parameters as they are; their gradients, summed over the group in one collective."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        total = torch.cat([gradient.flatten().float() for gradient in gradients])
        dist.all_reduce(total, group=ctx.group)
        sums = total.split([gradient.numel() for gradient in gradients])
        return None, *(s.view_as(g).to(g.dtype) for s, g in zip(sums, gradients, strict=True))


def gathered_linear(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`functional.linear` for weights that are whole in the passes alone (ZeRO-3).

    PyTorch's keeps a view of the weight for the backward pass. ZeRO-3 takes weights apart after the forward pass and
    gathers them again, so such views would hold the first gathered weights all the while: the whole model.
    """
    return LinearFunctionForZeroStage3.apply(hidden_states, weight, bias)


@dataclass(frozen=True)
class TensorRegion:
    """The way into and out of the part of a layer that tensor ranks split."""

    group: dist.ProcessGroup
    sequence_parallel: bool

    def start_entering(self, hidden_states: torch.Tensor) -> Waiting:
        """Start residual stream -> whole sequences."""
        return start_gathering(hidden_states, self.group) if self.sequence_parallel else lambda: hidden_states

    def start_leaving(self, partial: torch.Tensor) -> Waiting:
        """Start partial sums over whole sequences -> residual stream; may sum in place."""
        return (start_scattering if self.sequence_parallel else start_sum)(partial, self.group)

    def leave(self, partial: torch.Tensor) -> torch.Tensor:
        """Partial sums over whole sequences -> residual stream."""
        return (_Scatter if self.sequence_parallel else _Sum).apply(partial, self.group)

    def column(self, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`functional.linear` of the residual stream, as whole sequences."""
        return _Column.apply(states, weight, bias, self)

    def residual_parameters(self, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Parameters that every tensor rank holds whole, for use on the residual stream."""
        return _SumGradients.apply(self.group, *parameters) if self.sequence_parallel else parameters


class _Column(torch.autograd.Function):
    """A linear layer from the residual stream on, whose backward pass computes while it communicates.

    The input is gathered beside the product for the input's gradient, and that is summed beside the product for the
    weight's. Kept are this rank's part of the input, and the weight itself and no view of it (`gathered_linear`). Where
    the weight is frozen the input is neither kept nor gathered again.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, region: TensorRegion
    ) -> torch.Tensor:
        ctx.region = region
        ctx.save_for_backward(states if ctx.needs_input_grad[1] else None, weight)
        return functional.linear(region.start_entering(states)(), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed, (states, weight) = ctx.needs_input_grad, ctx.saved_tensors
        whole = ctx.region.start_entering(states) if needed[1] else None
        of_states = ctx.region.start_leaving(gradient.matmul(weight)) if needed[0] else None
        rows = gradient.flatten(0, -2)
        of_weight = rows.t().matmul(whole().flatten(0, -2)) if whole is not None else None
        of_bias = rows.sum(0) if needed[2] else None
        return of_states() if of_states is not None else None, of_weight, of_bias, None


class ColumnLinear(Linear):
    """A shard of the output features. [batch, seq of this rank, in] -> [batch, seq, out / size]."""

    region: TensorRegion

    def multiply(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.region.column(hidden_states, self.weight, self.bias)


class RowLinear(Linear):
    """A shard of the input features: [batch, seq, in / size] -> partial sums [batch, seq, out], without the bias."""

    def multiply(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.product(hidden_states, self.weight)


class SharedLinear(Linear):
    """A linear that every tensor rank holds whole and uses on a part of the tokens or features; without a bias.

    Its gradients, sums over that part, are added up over the ranks.
    """

    region: TensorRegion

    def multiply(self, hidden_states: torch.Tensor) -> torch.Tensor:
        (weight,) = _SumGradients.apply(self.region.group, self.weight)
        return self.product(hidden_states, weight)


class VocabularyEmbedding(Embedding):
    """A shard of the rows, from row `first` on. [batch, seq] ids -> [batch, seq of this rank, hidden]."""

    region: TensorRegion
    first: int

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        local = input_ids - self.first
        absent = (local < 0) | (local >= self.num_embeddings)
        rows = super().forward(local.clamp(0, self.num_embeddings - 1))
        return self.region.leave(rows.masked_fill(absent.unsqueeze(-1), 0.0))

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [batch, seq, rows of this shard]."""
        return self.region.column(hidden_states, self.weight)


class ResidualNorm(Norm):
    """A norm of this rank's part of the residual stream."""

    region: TensorRegion

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight, bias = self.region.residual_parameters(self.weight, self.bias)
        return functional.layer_norm(hidden_states, self.normalized_shape, weight, bias, self.eps)


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
