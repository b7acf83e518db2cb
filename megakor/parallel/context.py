"""Context parallelism: ranks split the sequence everywhere but in attention, where they split the heads.

DeepSpeed-Ulysses (Jacobs et al. 2023): one all-to-all before attention turns a part of every sequence with all heads
into whole sequences with a part of the heads, one after it turns them back. The fused projection is laid out head by
head, so queries, keys and values travel in one exchange.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def all_to_all(tensor: torch.Tensor, group: dist.ProcessGroup, to_heads: bool) -> torch.Tensor:
    """[batch, seq / size, heads, dim] -> [batch, seq, heads / size, dim], or the way back."""
    size = dist.get_world_size(group)
    if to_heads:
        sent = tensor.unflatten(2, (size, -1)).permute(2, 0, 1, 3, 4)
    else:
        sent = tensor.unflatten(1, (size, -1)).permute(1, 0, 2, 3, 4)
    sent = sent.contiguous()  # [size, batch, seq / size, heads / size, dim]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    if to_heads:
        return received.permute(1, 0, 2, 3, 4).flatten(1, 2)
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: dist.ProcessGroup, to_heads: bool) -> torch.Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        return all_to_all(tensor, group, to_heads)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        return all_to_all(gradient, ctx.group, not ctx.to_heads), None, None


def exchange(tensor: torch.Tensor, group: dist.ProcessGroup, to_heads: bool) -> torch.Tensor:
    """Swap the split between sequence and heads; every rank of the group calls.

    Args:
        tensor: [batch, seq / size, heads, dim], or [batch, seq, heads / size, dim] on the way back.
        to_heads: towards whole sequences with a part of the heads.
    """
    return _Exchange.apply(tensor, group, to_heads)


def own_part(array: np.ndarray, size: int, index: int) -> np.ndarray:
    """Part `index` of `size` of the sequences of [batch, seq]."""
    length = array.shape[1] // size
    return array[:, index * length : (index + 1) * length]
