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
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3
from torch.nn import functional

from megakor.model.layers import Embedding, Linear, Norm

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
