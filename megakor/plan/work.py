"""Amounts of work, whatever does it: matrix products, attention, bytes that stream through memory, messages.

`megakor.plan.passes` says how much of it a layout's ranks have, `megakor.plan.clock` how long a hardware takes.
"""

from __future__ import annotations

from dataclasses import dataclass

FP32 = 4  # bytes


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
        copies: whether gradients, and weights that are gathered, are copied on their way as DeepSpeed 0.19 does
            (`megakor.plan.clock.summed_bytes`, `gathered_bytes`); otherwise a gradient is added to its sum in one pass.
    """

    fused_attention: bool = True
    virtual_stages: int = 1
    hides_tensor_messages: bool = True
    hides_replica_messages: tuple[int, ...] = (3,)
    sends_parts: bool = False
    stops_early: bool = True
    wide_gradients: bool = False
    copies: bool = True


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
    """So many matrix products [rows, inner] × [inner, columns]."""

    rows: float
    inner: float
    columns: float
    count: float = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns * self.count

    def num_bytes(self, item_size: int) -> float:
        """Bytes of both operands and the result."""
        sides = self.rows * self.inner + self.inner * self.columns + self.rows * self.columns
        return item_size * sides * self.count

    @property
    def backward(self) -> tuple[Product, Product]:
        """The products of the gradients by the left operand and by the right one."""
        return (
            Product(self.rows, self.columns, self.inner, self.count),
            Product(self.inner, self.rows, self.columns, self.count),
        )


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
        products: matrix products.
        streamed: bytes that operations bound by memory read and write.
        messages: collectives.
        attention: FLOPs of fused attention.
    """

    products: tuple[Product, ...] = ()
    streamed: float = 0.0
    messages: tuple[Message, ...] = ()
    attention: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.streamed + other.streamed,
            self.messages + other.messages,
            self.attention + other.attention,
        )


NOTHING = Work()
