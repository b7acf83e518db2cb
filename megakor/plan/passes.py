"""What a rank does with one micro-batch.

    model, layout, micro-batch ─► Shape ─► forward and backward Work of a block, of the embedding, of the head

Counted is what megakor's modules do (`megakor.model`, `megakor.parallel.tensor`), or another system by its `Practice`.
Sizes of products are a rank's, after tensor parallelism has split them. Bytes of messages are of the whole tensor.
Bytes that stream count every tensor that an operation reads or writes, operations one by one as PyTorch runs them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

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
        return self.stream / (self.tensor if self.splits_stream else 1)

    @property
    def splits_stream(self) -> bool:
        """Whether tensor ranks split the residual stream along the sequence."""
        return self.tensor > 1 and self.parallel.sequence_parallel

    def linear(self, product: Product, name: str) -> tuple[Work, Work, Product | None]:
        """A linear layer without its messages: forward, backward, and of that the weight's gradient if it has one."""
        by_input, by_weight = product.backward
        if self.adapters is None:
            return Work((product,)), Work((by_input, by_weight)), by_weight
        if name not in self.adapters.targets:
            return Work((product,)), Work((by_input,)), None
        down = Product(product.rows, product.inner, self.adapters.rank)
        up = Product(product.rows, self.adapters.rank, product.columns)
        adding = 3 * product.rows * product.columns * self.item_size
        return Work((product, down, up), adding), Work((by_input, *down.backward, *up.backward)), None

    def entering(self, columns: float, name: str) -> tuple[Work, Work]:
        """A linear layer out of the residual stream, with `columns` outputs here: forward and backward.

        Backward, the input is gathered again beside the product of the input's gradient, and the sum of that runs
        beside the product of the weight's.
        """
        product = Product(self.rows, self.model.hidden_size, columns)
        forward, backward, by_weight = self.linear(product, name)
        hides, stream = self.practice.hides_tensor_messages, self.stream
        before, after = (product.backward[0], by_weight) if hides else (None, None)
        of_bias = columns * self.rows * self.item_size if by_weight else 0.0
        gather: tuple[Message, ...] = ()
        messages: tuple[Message, ...] = ()
        if self.splits_stream:
            gather = (Message("tensor", "all_gather", stream),)
            messages = (
                Message("tensor", "all_gather", stream, before),
                Message("tensor", "reduce_scatter", stream, after),
            )
        elif self.tensor > 1:
            messages = (Message("tensor", "all_reduce", stream, after),)
        return forward + Work(messages=gather), backward + Work(streamed=of_bias, messages=messages)

    def leaving(self, inner: float, name: str) -> tuple[Work, Work]:
        """A linear layer towards the residual stream, with `inner` inputs here: forward and backward."""
        forward, backward, by_weight = self.linear(Product(self.rows, inner, self.model.hidden_size), name)
        return forward, backward + Work(streamed=self.stream if by_weight else 0.0)

    def joining(self, branches: int, biases: int) -> tuple[Work, Work]:
        """Adding branches up over the tensor ranks, with so many biases, and onto the residual stream."""
        forward: tuple[Message, ...] = ()
        backward: tuple[Message, ...] = ()
        if self.splits_stream:
            forward = (Message("tensor", "reduce_scatter", self.stream),)
            backward = (Message("tensor", "all_gather", self.stream),)
            if biases:
                backward += (Message("tensor", "all_reduce", float(FP32 * biases * self.model.hidden_size)),)
        elif self.tensor > 1:
            forward = (Message("tensor", "all_reduce", self.stream),)
        adding = 3 * (branches - 1) * self.stream + 3 * self.residual
        if self.tensor > 1:
            adding += 2 * biases * self.residual
        return Work((), adding, forward), Work((), 3 * branches * self.residual, backward)

    def norm(self) -> tuple[Work, Work]:
        """A norm of this rank's part of the residual stream; where ranks split it, gradients of weights are summed."""
        weights = 2.0 * FP32 * self.model.hidden_size
        summed = (Message("tensor", "all_reduce", weights),) if self.splits_stream else ()
        return Work((), 2 * self.residual), Work((), 5 * self.residual, summed)

    def attending(self) -> tuple[Work, Work]:
        """Rotary embedding and attention over whole sequences with this rank's heads, without the linear layers.

        Fused attention computes its scores again in the backward pass: 5 products to the forward pass's 2 (Dao et al.
        2022, section 3.1).
        """
        context = self.parallel.context_parallel_size
        states = self.stream / self.tensor
        rotating = 2 * (2 + 10 * self.model.rotary_pct) * states
        exchanged = tuple(Message("context", "all_to_all", size * states) for size in (3, 1)) if context > 1 else ()
        count = self.batch * self.model.num_attention_heads / self.tensor / context
        head_dim = self.model.hidden_size // self.model.num_attention_heads
        if self.practice.fused_attention:
            causal = 2.0 * count * self.sequence**2 * head_dim
            return (
                Work((), rotating, exchanged, causal),
                Work((), rotating + 6 * states, exchanged, 2.5 * causal),
            )
        scores = count * self.sequence**2 * self.item_size
        by_keys = Product(self.sequence, head_dim, self.sequence, count)
        by_values = Product(self.sequence, self.sequence, head_dim, count)
        forward, backward = SCORE_PASSES
        return (
            Work((by_keys, by_values), rotating + forward * scores, exchanged),
            Work(by_keys.backward + by_values.backward, rotating + 6 * states + backward * scores, exchanged),
        )

    @cached_property
    def block(self) -> tuple[Work, Work, Work, Work]:
        """A block: forward, backward, and what the backward pass computes again under `full` and under `selective`."""
        model, split = self.model, self.tensor
        hidden, inner = model.hidden_size / split, model.intermediate_size / split
        activation = self.rows * inner * self.item_size
        attention, together, own = self.attending(), model.use_parallel_residual, int(model.attention_bias)
        parts = [
            self.norm(), self.norm(), self.entering(3 * hidden, QUERY_KEY_VALUE), attention,
            self.leaving(hidden, DENSE), *([] if together else [self.joining(1, own)]), self.entering(inner, UP),
            (Work((), 2 * activation), Work((), 3 * activation)),
        ]  # fmt: skip
        last = [self.leaving(inner, DOWN), self.joining(2, 1 + own) if together else self.joining(1, 1)]
        forward, backward = (sum(works, NOTHING) for works in zip(*parts, *last, strict=True))
        again = sum((work for work, _ in parts), NOTHING) if self.practice.stops_early else forward
        return forward, backward, again, replace(attention[0], messages=())

    def embedding(self) -> tuple[Work, Work]:
        """Looking up rows, summed over the tensor ranks that split them."""
        (joined, gathered), rows = self.joining(1, 0), 2 * self.stream
        return replace(joined, streamed=rows * (1 if self.tensor == 1 else 2)), replace(gathered, streamed=rows)

    def head(self) -> tuple[Work, Work]:
        """Final norm, output projection and loss."""
        assert self.model.vocab_size is not None
        columns = self.model.vocab_size / self.tensor
        norm, (forward, backward) = self.norm(), self.entering(columns, HEAD)
        logits = self.rows * columns
        losses = [
            Work((), logits * (own * self.item_size + wide * FP32))
            for own, wide in zip(LOSS_PASSES, LOSS_FP32_PASSES, strict=True)
        ]
        if self.tensor > 1:
            numbers = (1, 2)  # of a token: its maximum; the sum of exponentials and the label's logit
            losses[0] += Work(
                messages=tuple(Message("tensor", "all_reduce", count * FP32 * self.rows) for count in numbers)
            )
        return norm[0] + forward + losses[0], norm[1] + backward + losses[1]


def parts_of(shape: Shape, train: TrainConfig) -> dict[str, Work]:
    """What a micro-batch does, in pieces: a block, what of a block is computed again, the embedding, the head."""
    forward, backward, again, attention = shape.block
    repeated = {
        ActivationCheckpointing.none: NOTHING,
        ActivationCheckpointing.full: again,
        ActivationCheckpointing.selective: attention,
    }
    return {
        "block": forward + backward,
        "again": repeated[train.activation_checkpointing],
        "embedding": sum(shape.embedding(), NOTHING),
        "head": sum(shape.head(), NOTHING),
    }


def counts_of(layers: StageLayers, train: TrainConfig) -> dict[str, int]:
    """How often a stage does each of these pieces for a micro-batch."""
    full = train.activation_checkpointing is ActivationCheckpointing.full
    every = train.activation_checkpointing_interval if full else 1
    return {
        "block": len(layers.blocks),
        "again": sum(index % every == 0 for index in layers.blocks),
        "embedding": int(layers.embeds),
        "head": int(layers.projects),
    }
