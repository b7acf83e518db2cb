"""What a rank does with one micro-batch.

    model, layout, micro-batch ─► Shape ─► forward and backward Work of a block and of the ends ─► of a stage

Counted is what megakor's modules do (`megakor.model`, `megakor.parallel.tensor`), or another system by its `Practice`.
Sizes of products are a rank's, after tensor parallelism has split them. Bytes of messages are of the whole tensor.
Bytes that stream count every tensor that an operation reads or writes, operations one by one as PyTorch runs them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from megakor.config.choices import ActivationCheckpointing
from megakor.config.schema import ModelConfig, ParallelConfig, TrainConfig
from megakor.plan.work import (
    DENSE,
    DOWN,
    FP32,
    HEAD,
    MEGAKOR,
    NOTHING,
    QUERY_KEY_VALUE,
    UP,
    Adapters,
    Message,
    Practice,
    Product,
    StageLayers,
    Work,
)

SCORE_PASSES = 6.5, 9.5
"""Times that attention which is not fused passes over its scores, forward and backward: mask and softmax, dropout and
its mask of a byte each."""
LOSS_PASSES, LOSS_FP32_PASSES = (2, 2), (6, 8)
"""Times that the loss passes over its logits, forward and backward: in their own type, and over copies in fp32."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a micro-batch on a rank.

    Attributes:
        batch: sequences.
        sequence: tokens of a whole sequence.
        item_size: bytes of a number.
        adapters: what is trained; None: all weights.
    """

    model: ModelConfig
    parallel: ParallelConfig
    batch: int
    sequence: int
    item_size: int
    adapters: Adapters | None = None
    practice: Practice = MEGAKOR

    @property
    def tensor(self) -> int:
        return self.parallel.tensor_parallel_size

    @property
    def rows(self) -> float:
        """Tokens that a linear layer sees."""
        return self.batch * self.sequence / self.parallel.context_parallel_size

    @property
    def stream(self) -> float:
        """Bytes of hidden states of the rows."""
        return self.rows * self.model.hidden_size * self.item_size

    @property
    def residual(self) -> float:
        """Bytes of this rank's part of the residual stream."""
        return self.stream / (self.tensor if self.parallel.sequence_parallel else 1)

    def linear(self, product: Product, name: str) -> tuple[Work, list[Product], Product | None]:
        """A linear layer without its messages: forward, what adapters add backward, and the weight's gradient."""
        if self.adapters is None:
            return Work.of([product], 0.0), [], product.backward[1]
        if name not in self.adapters.targets:
            return Work.of([product], 0.0), [], None
        down = Product(product.rows, product.inner, self.adapters.rank)
        up = Product(product.rows, self.adapters.rank, product.columns)
        adding = 3 * product.rows * product.columns * self.item_size
        return Work.of([product, down, up], adding), [*down.backward, *up.backward], None

    def entering(self, columns: float, name: str) -> tuple[Work, Work]:
        """A linear layer out of the residual stream, with `columns` outputs here: forward and backward.

        Backward, the input is gathered again beside the product of the input's gradient, and the sum of that runs
        beside the product of the weight's.
        """
        product = Product(self.rows, self.model.hidden_size, columns)
        forward, added, by_weight = self.linear(product, name)
        by_input = product.backward[0]
        products = [by_input, *added] + ([by_weight] if by_weight else [])
        before, after = (by_input, by_weight) if self.practice.hides_tensor_messages else (None, None)
        gather, messages = [], []
        if self.tensor > 1 and self.parallel.sequence_parallel:
            gather = [Message("tensor", "all_gather", self.stream)]
            messages.append(Message("tensor", "all_gather", self.stream, before))
            messages.append(Message("tensor", "reduce_scatter", self.stream, after))
        elif self.tensor > 1:
            messages.append(Message("tensor", "all_reduce", self.stream, after))
        of_bias = columns * self.rows * self.item_size if by_weight else 0.0
        return forward + Work.of([], 0.0, gather), Work.of(products, of_bias, messages)

    def leaving(self, inner: float, name: str) -> tuple[Work, Work]:
        """A linear layer towards the residual stream, with `inner` inputs here: forward and backward."""
        product = Product(self.rows, inner, self.model.hidden_size)
        forward, added, by_weight = self.linear(product, name)
        products = [product.backward[0], *added] + ([by_weight] if by_weight else [])
        return forward, Work.of(products, self.stream if by_weight else 0.0)

    def joining(self, branches: int) -> tuple[Work, Work]:
        """Adding branches up over the tensor ranks, and onto the residual stream."""
        forward, backward = [], []
        if self.tensor > 1 and self.parallel.sequence_parallel:
            forward.append(Message("tensor", "reduce_scatter", self.stream))
            backward.append(Message("tensor", "all_gather", self.stream))
        elif self.tensor > 1:
            forward.append(Message("tensor", "all_reduce", self.stream))
        biases = 2 * branches * self.residual if self.tensor > 1 else 0.0
        adding = 3 * (branches - 1) * self.stream + 3 * self.residual
        return Work.of([], adding + biases, forward), Work.of([], 3 * branches * self.residual, backward)

    def norm(self) -> tuple[Work, Work]:
        """A norm of this rank's part of the residual stream; where ranks split it, gradients of weights are summed."""
        split = self.tensor > 1 and self.parallel.sequence_parallel
        summed = [Message("tensor", "all_reduce", 2.0 * FP32 * self.model.hidden_size)] if split else []
        return Work.of([], 2 * self.residual), Work.of([], 5 * self.residual, summed)

    def attending(self) -> tuple[Work, Work]:
        """Rotary embedding and attention over whole sequences with this rank's heads, without the linear layers.

        Fused attention computes its scores again in the backward pass: 5 products to the forward pass's 2 (Dao et al.
        2022, section 3.1).
        """
        context = self.parallel.context_parallel_size
        states = self.stream / self.tensor
        rotating = 2 * (2 + 10 * self.model.rotary_pct) * states
        exchanged = [Message("context", "all_to_all", size * states) for size in (3, 1)] if context > 1 else []
        heads = self.model.num_attention_heads / self.tensor / context
        head_dim = self.model.hidden_size // self.model.num_attention_heads
        whole = 4.0 * self.batch * heads * self.sequence**2 * head_dim
        if self.practice.fused_attention:
            causal = whole / 2
            return (
                Work.of([], rotating, exchanged, causal),
                Work.of([], rotating + 6 * states, exchanged, 2.5 * causal),
            )
        count = round(self.batch * heads)
        scores = self.batch * heads * self.sequence**2 * self.item_size
        products = [
            Product(self.sequence, head_dim, self.sequence),
            Product(self.sequence, self.sequence, head_dim),
        ]
        gradients = [gradient for product in products for gradient in product.backward]
        forward, backward = SCORE_PASSES
        return (
            Work.of(products * count, rotating + forward * scores, exchanged),
            Work.of(gradients * count, rotating + 6 * states + backward * scores, exchanged),
        )

    def block(self) -> tuple[Work, Work, Work, Work]:
        """A block: forward, backward, and what the backward pass computes again under `full` and under `selective`."""
        model, split = self.model, self.tensor
        hidden, inner = model.hidden_size / split, model.intermediate_size / split
        activation = self.rows * inner * self.item_size
        attention = self.attending()
        parts = [
            self.norm(), self.norm(), self.entering(3 * hidden, QUERY_KEY_VALUE), attention,
            self.leaving(hidden, DENSE), *([] if model.use_parallel_residual else [self.joining(1)]),
            self.entering(inner, UP), (Work.of([], 2 * activation), Work.of([], 3 * activation)),
        ]  # fmt: skip
        last = [self.leaving(inner, DOWN), self.joining(2 if model.use_parallel_residual else 1)]
        forward, backward = (sum(works, NOTHING) for works in zip(*parts, *last, strict=True))
        again = sum((work for work, _ in parts), NOTHING) if self.practice.stops_early else forward
        return forward, backward, again, replace(attention[0], messages=Counter())

    def embedding(self) -> tuple[Work, Work]:
        """Looking up rows, summed over the tensor ranks that split them."""
        (joined, gathered), rows = self.joining(1), 2 * self.stream
        return (
            replace(joined, streamed=rows if self.tensor == 1 else 2 * rows),
            replace(gathered, streamed=rows),
        )

    def head(self) -> tuple[Work, Work]:
        """Final norm, output projection and loss."""
        assert self.model.vocab_size is not None
        columns = self.model.vocab_size / self.tensor
        norm, (forward, backward) = self.norm(), self.entering(columns, HEAD)
        logits = self.rows * columns
        losses = [
            Work.of([], logits * (own * self.item_size + wide * FP32))
            for own, wide in zip(LOSS_PASSES, LOSS_FP32_PASSES, strict=True)
        ]
        if self.tensor > 1:
            tokens = [Message("tensor", "all_reduce", numbers * FP32 * self.rows) for numbers in (1, 2)]
            losses[0] += Work.of([], 0.0, tokens)
        return norm[0] + forward + losses[0], norm[1] + backward + losses[1]


def stage_work(shape: Shape, layers: StageLayers, train: TrainConfig) -> tuple[Work, Work, Work]:
    """One micro-batch of a stage: forward, backward, and what the backward pass computes again."""
    block_forward, block_backward, block_again, attention = shape.block()
    count, kind = len(layers.blocks), train.activation_checkpointing
    forward, backward, again = block_forward.times(count), block_backward.times(count), NOTHING
    for there, (end_forward, end_backward) in ((layers.embeds, shape.embedding()), (layers.projects, shape.head())):
        if there:
            forward, backward = forward + end_forward, backward + end_backward
    if kind is ActivationCheckpointing.full:
        recomputed = sum(index % train.activation_checkpointing_interval == 0 for index in layers.blocks)
        again = block_again.times(recomputed)
    elif kind is ActivationCheckpointing.selective:
        again = attention.times(count)
    return forward, backward, again
