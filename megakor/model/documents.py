"""Several documents in a row: positions begin anew at each document, and attention stays within it.

    number of each token's document ─► `Borders` of a micro-batch ─► `Documents` ─► every block's attention

Only hidden states cross a border of pipeline stages. So every stage is told the borders of all micro-batches of a step,
and finds out by counting its forward passes which of them is at work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Borders:
    """Where the documents of a micro-batch lie, its rows laid end to end.

    Attributes:
        positions: of each token in its document, int64 [batch, seq].
        starts: the first token of each document, and the number of all tokens, int32 [num_documents + 1].
        lengths: tokens of each document.
        longest: the most of them.
    """

    positions: torch.Tensor
    starts: torch.Tensor
    lengths: list[int]
    longest: int

    @classmethod
    def of(
        cls, documents: torch.Tensor, put: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    ) -> Borders:
        """From the number of each token's document, [batch, seq] on the host.

        Args:
            put: brings a tensor from the host to where the model computes.
        """
        begins = torch.ones_like(documents, dtype=torch.bool)  # a row begins a document
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        first = begins.flatten().nonzero().flatten()
        starts = torch.cat((first, torch.tensor([documents.numel()])))
        lengths = starts.diff()
        positions = torch.arange(documents.numel()) - first.repeat_interleave(lengths)
        return cls(put(positions.view_as(documents)), put(starts.int()), lengths.tolist(), int(lengths.max()))


Attending = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Borders, float], torch.Tensor]
"""Causal attention within documents: query, key and value [batch × seq, heads, head_dim], where the documents lie, and
the probability of dropout -> [batch × seq, heads, head_dim]."""


def one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: Borders, dropout: float
) -> torch.Tensor:
    """Attend document by document, on any device. It takes no mask, and only the pairs of tokens that there are.

    Not for `torch.compile`: its graph would be of one micro-batch's lengths.
    """
    contexts = []
    for document in zip(*(states.split(borders.lengths) for states in (query, key, value)), strict=True):
        queries, keys, values = (states.transpose(0, 1).unsqueeze(0) for states in document)  # [1, heads, length, …]
        context = functional.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, is_causal=True)
        contexts.append(context.squeeze(0).transpose(0, 1))
    return torch.cat(contexts)


def all_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: Borders,
    dropout: float,
    otherwise: Attending = one_by_one,
) -> torch.Tensor:
    """Attend in one kernel, FlashAttention's for documents of several lengths; for half precision on GPUs.

    It has no dropout, and takes heads of a multiple of 8 up to 256: others attend one by one.

    Args:
        otherwise: `one_by_one`, or what stands for it where blocks are compiled.
    """
    from torch.nn.attention.varlen import varlen_attn  # older versions of PyTorch have none

    if dropout or query.shape[-1] % 8 or query.shape[-1] > 256:
        return otherwise(query, key, value, borders, dropout)
    starts, longest = borders.starts, borders.longest
    causal = (-1, 0)  # all tokens before, none after
    return varlen_attn(query, key, value, starts, starts, longest, longest, window_size=causal)  # type: ignore[return-value]


@dataclass
class Documents:
    """Which borders are at work. The engine calls `start`, the model `next_micro_batch` in each forward pass.

    Attributes:
        attend: attention within documents.
        current: of this forward pass's micro-batch; None: rows are one stretch.
    """

    attend: Attending = one_by_one
    current: Borders | None = None
    coming: Iterator[Borders | None] | None = None

    def start(self, micro_batches: Iterable[Borders | None]) -> None:
        """The borders of the next forward passes; they are drawn when their pass begins."""
        self.coming = iter(micro_batches)

    def next_micro_batch(self) -> None:
        if self.coming is None:  # nobody has told any: generation, for one
            return
        try:
            self.current = next(self.coming)
        except StopIteration:
            raise AssertionError("a forward pass more than micro-batches with known documents") from None
