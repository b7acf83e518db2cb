"""Amounts of work, whatever does it: matrix products, attention, bytes that stream through memory, messages.

`megakor.plan.passes` says how much of it a layout's ranks have, `megakor.plan.clock` how long a hardware takes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megakor.config.choices import Precision

ITEM_SIZE = {Precision.fp32: 4, Precision.bf16: 2, Precision.fp16: 2}
"""Bytes of a number in an arithmetic."""
FP32 = 4


@dataclass(frozen=True)
class Practice:
    """What systems do differently. The defaults are megakor's; others are described to compare the plan with them.

    Attributes:
        fused_attention: FlashAttention, which leaves out the masked half; otherwise scores go through memory.
        virtual_stages: parts of the model that a pipeline stage interleaves (Narayanan et al. 2021, section 2.2.2).
        hides_tensor_messages: whether the backward pass of a column linear computes while it communicates.
        hides_replica_messages: the ZeRO stages whose messages run beside the passes.
        sends_parts: whether tensor ranks send a part each of what crosses a border of stages, and gather it there
            (Narayanan et al. 2021, section 4.1).
        stops_early: whether recomputing a block ends before its last linear layer, whose result nothing needs:
            PyTorch's checkpoints do since 2.1, unless they are reentrant.
        wide_gradients: whether replicas sum gradients in fp32 under ZeRO-2 and 3, too.
    """

    fused_attention: bool = True
    virtual_stages: int = 1
    hides_tensor_messages: bool = True
    hides_replica_messages: tuple[int, ...] = (3,)
    sends_parts: bool = False
    stops_early: bool = True
    wide_gradients: bool = False


MEGAKOR = Practice()


QUERY_KEY_VALUE, DENSE, UP, DOWN = "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"
HEAD = "embed_out"
LINEARS = QUERY_KEY_VALUE, DENSE, UP, DOWN
"""A block's linear layers."""


@dataclass(frozen=True)
class Adapters:
    """LoRA (Hu et al. 2021): the model is frozen, and products of two thin matrices are added to some linear layers.

    Attributes:
        rank: the thin matrices' other dimension.
        targets: the layers, of `LINEARS`.
    """

    rank: int
    targets: tuple[str, ...]


@dataclass(frozen=True)
class StageLayers:
    """What a pipeline stage holds.

    Attributes:
        blocks: numbers of its blocks.
        embeds: whether it has the embedding.
        projects: whether it has the final norm, the output projection and the loss.
    """

    blocks: range
    embeds: bool
    projects: bool


@dataclass(frozen=True)
class Product:
    """A matrix product [rows, inner] × [inner, columns]."""

    rows: float
    inner: float
    columns: float

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns

    def num_bytes(self, item_size: int) -> float:
        """Bytes of both operands and the result."""
        return item_size * (self.rows * self.inner + self.inner * self.columns + self.rows * self.columns)

    @property
    def backward(self) -> list[Product]:
        """The products of the gradients by the left operand and by the right one."""
        return [
            Product(self.rows, self.columns, self.inner),
            Product(self.inner, self.rows, self.columns),
        ]


@dataclass(frozen=True)
class Message:
    """A collective.

    Attributes:
        axis: tensor or context.
        kind: all_reduce, all_gather, reduce_scatter or all_to_all.
        num_bytes: of the whole tensor.
        beside: the product that is computed meanwhile; None: nothing is.
    """

    axis: str
    kind: str
    num_bytes: float
    beside: Product | None = None


@dataclass(frozen=True)
class Work:
    """An amount of work.

    Attributes:
        products: matrix products, how often.
        attention: FLOPs of fused attention.
        streamed: bytes that operations bound by memory read and write.
        messages: collectives, how often.
    """

    products: Counter[Product]
    attention: float
    streamed: float
    messages: Counter[Message]

    @classmethod
    def of(
        cls, products: list[Product], streamed: float, messages: list[Message] | None = None, attention: float = 0.0
    ) -> Work:
        return cls(Counter(products), attention, streamed, Counter(messages or []))

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.attention + other.attention,
            self.streamed + other.streamed,
            self.messages + other.messages,
        )

    def times(self, number: int) -> Work:
        return Work(
            Counter({product: count * number for product, count in self.products.items()}),
            self.attention * number,
            self.streamed * number,
            Counter({message: count * number for message, count in self.messages.items()}),
        )

    @property
    def flops(self) -> float:
        return self.attention + sum(product.flops * count for product, count in self.products.items())


NOTHING = Work.of([], 0.0)
