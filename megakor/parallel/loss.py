"""The loss over logits whose vocabulary is split: no rank ever sees another's logits.

Per token: the maximum and the sum of exponentials over the rank's columns, and the label's logit where the rank has
it; the group reduces these three numbers (Megatron-LM, Shoeybi et al. 2019, section 3). Rows are worked through some at
a time, so that fp32 copies stay small: the logits of a large vocabulary are the biggest tensor of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megakor.parallel.groups import Groups


@dataclass(frozen=True)
class VocabularyShard:
    """The columns of the logits that a rank holds.

    Attributes:
        first: id of the first column.
        num_real: columns that belong to the true vocabulary; the rest, at the end, are padding.
        group: the ranks that hold the other columns; None where one rank holds all.
        chunk: logits worked through at a time: few enough for a CPU's cache, enough to fill an accelerator.
    """

    first: int
    num_real: int
    group: dist.ProcessGroup | None
    chunk: int

    @classmethod
    def of(cls, groups: Groups, num_rows: int, num_tokens: int, chunk: int) -> VocabularyShard:
        """A tensor rank's share of `num_rows` columns, of which the first `num_tokens` are real."""
        size = groups.dims.tensor
        columns = num_rows // size
        first = groups.position("tensor") * columns
        num_real = max(0, min(columns, num_tokens - first))
        return cls(first, num_real, groups.tensor if size > 1 else None, chunk)

    def chunks(self, logits: torch.Tensor) -> Iterator[slice]:
        """Slices of the rows."""
        count = max(1, self.chunk // logits.shape[1])
        return (slice(start, start + count) for start in range(0, logits.shape[0], count))


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, shard: VocabularyShard
    ) -> torch.Tensor:
        """[rows, columns], [rows], fp32 [rows] -> scalar, fp32."""
        real = shard.num_real
        maxima = torch.full_like(weights, -torch.inf)
        if real:
            for rows in shard.chunks(logits):
                maxima[rows] = logits[rows, :real].amax(-1).float()
        if shard.group is not None:
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group=shard.group)
        columns = labels - shard.first
        absent = (columns < 0) | (columns >= real)
        columns = columns.masked_fill(absent, 0)
        chosen = logits.gather(1, columns[:, None])[:, 0].float().masked_fill(absent, 0.0)
        sums = torch.zeros_like(weights)
        if real:
            for rows in shard.chunks(logits):
                sums[rows] = (logits[rows, :real].float() - maxima[rows, None]).exp_().sum(-1)
        if shard.group is not None:
            both = torch.stack((sums, chosen))
            dist.all_reduce(both, group=shard.group)
            sums, chosen = both
        loss = ((maxima - chosen + sums.log()) * weights).sum()
        weights = weights + 0.0 * loss  # where the loss is not finite, nor shall any gradient be
        ctx.save_for_backward(logits, columns, absent, weights, maxima, sums)
        ctx.shard = shard
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, columns, absent, weights, maxima, sums = ctx.saved_tensors
        weights = weights * gradient
        factors, own = weights / sums, -weights.masked_fill(absent, 0.0)
        result = torch.empty_like(logits)
        real = ctx.shard.num_real
        result[:, real:] = 0
        if real:
            for rows in ctx.shard.chunks(logits):
                scaled = (logits[rows, :real].float() - maxima[rows, None]).exp_().mul_(factors[rows, None])
                result[rows, :real] = scaled.scatter_add_(1, columns[rows, None], own[rows, None])
        return result, None, None, None


def vocabulary_loss(
    logits: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor, scale: torch.Tensor, shard: VocabularyShard
) -> torch.Tensor:
    """`scale` × the sum of the losses of unmasked tokens in nats: an fp32 scalar, the same on every rank of the group.

    Every rank of `shard.group` calls. A loss that is not finite has no finite gradients, even where its derivatives
    are (a label whose logit is -inf), so who looks at the gradients need not look at the loss.

    Args:
        logits: [batch, seq, columns of this rank].
        labels: [batch, seq] ids of the true vocabulary.
        loss_mask: [batch, seq], 1 where the label counts.
        scale: scalar.
        shard: which columns this rank holds.
    """
    weights = (loss_mask * scale).flatten()
    return _Loss.apply(logits.flatten(0, 1), labels.flatten(), weights, shard)
