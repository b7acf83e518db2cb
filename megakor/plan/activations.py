"""What a micro-batch takes on a pipeline stage: the layers go in, bytes that wait for the backward pass and their peak out.

It is what `megakor simulate` finds by running the model on fake tensors, as formulas: kept bytes are the same to the byte,
peaks to within 3 %, by test. The terms of a block follow Korthikanti et al. 2022, section 4, with what differs here:
attention is fused, so its scores are never kept, but one number for each row is; rotary embedding makes queries and keys
anew; both norms of a parallel residual read one input; and there are no dropout masks unless asked for.

Sizes are a rank's. With s tokens of the residual stream and f of whole sequences (s = f / tensor under sequence
parallelism, else f), hidden size H, feed-forward size I, t tensor ranks and i bytes a number, a block keeps

    input s·H·i     two norms 2·s·H·i     queries, keys and values 3·f·H·i/t     feed-forward 2·f·I·i/t
    attention 3·f·H·i/t (rotated queries and keys, output) and f·H·i/t (its output again, laid out for the projection)

and little: norms' statistics, attention's row sums, rotary tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megakor.config.schema import ActivationCheckpointing, EngineConfig, ModelConfig
from megakor.model.specs import EMBEDDING, FINAL_NORM
from megakor.parallel.dims import ParallelDims
from megakor.plan.partition import Layer

LOSS_CHUNK = 2**27
"""Logits that the loss works through at a time on accelerators, as `megakor.train.device` has it."""
FP32, INT64 = 4, 8  # bytes


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on a rank of a stage.

    Attributes:
        kept: from its forward pass to its backward pass.
        peak: the most at once, in the backward pass.
        logits: of the peak, those of the logits and the loss.
        buffers: of the peak, what DeepSpeed's pipeline holds besides: what neighbours send.
    """

    kept: int
    peak: int
    logits: int
    buffers: int


@dataclass(frozen=True)
class Block:
    """Bytes of the parts of a block.

    Attributes:
        stream: hidden states of the residual stream.
        whole: hidden states of whole sequences.
        heads: the same of the rank's heads alone.
        inner: states of the feed-forward layer.
        norms: what the norms keep, the input of the first one left out; the first norm alone.
        masks: of dropout; the host's are of the states' type.
        scores: what attention keeps besides the projection: rotated queries and keys, tables, output, row sums.
        projections: weights of the fused projection, and of one of the feed-forward layer.
        gathered: whether whole sequences are gathered from the tensor ranks' parts (sequence parallelism).
        copies: what such a gather or scatter copies; a single sequence needs no copy.
        parallel: whether attention and feed-forward share input and output (`use_parallel_residual`).
    """

    stream: int
    whole: int
    heads: int
    inner: int
    norms: int
    first_norm: int
    masks: int
    scores: int
    projections: tuple[int, int]
    gathered: bool
    copies: int
    parallel: bool

    @classmethod
    def of(cls, config: EngineConfig, model: ModelConfig, dims: ParallelDims) -> Block:
        train, item, hidden, tensor = config.train, config.train.precision.itemsize, model.hidden_size, dims.tensor
        tokens = train.micro_batch_size * train.sequence_length // dims.context
        stream_tokens = tokens // tensor if dims.sequence_parallel else tokens
        stream, whole, heads = stream_tokens * hidden * item, tokens * hidden * item, tokens * hidden // tensor * item
        first_norm = stream + 2 * stream_tokens * item
        own_input = 0 if model.use_parallel_residual else stream
        num_masks = (1 if model.use_parallel_residual else 2) if model.hidden_dropout else 0
        rotary = int(hidden // model.num_attention_heads * model.rotary_pct)
        tables, row_sums = 2 * train.sequence_length * rotary * item, FP32 * tokens * model.num_attention_heads // tensor
        return cls(
            stream=stream,
            whole=whole,
            heads=heads,
            inner=tokens * model.intermediate_size // tensor * item,
            norms=2 * first_norm + own_input,
            first_norm=first_norm,
            masks=num_masks * stream,
            scores=3 * heads + tables + row_sums,
            projections=(3 * hidden * hidden // tensor * item, hidden * model.intermediate_size // tensor * item),
            gathered=dims.sequence_parallel,
            copies=whole if dims.sequence_parallel and train.micro_batch_size > 1 else 0,
            parallel=model.use_parallel_residual,
        )

    def kept(self, scores: bool = True) -> int:
        """Besides the input; without `scores`, attention is computed again."""
        return self.norms + self.masks + 4 * self.heads + (self.scores if scores else 0) + 2 * self.inner

    def through_column(self, weight: int) -> int:
        """The most that the backward pass of a column linear makes: gradients of its input and of its weight."""
        if not self.gathered:
            return self.whole + weight
        gathered = self.whole + self.copies + self.stream
        return max(gathered + self.whole, gathered + weight)  # the input's gradient is scattered first

    def forward(self, tensor: int) -> int:
        """What the end of the forward pass makes and does not keep: outputs, their sum, and copies with a bias more."""
        outputs = 2 * self.whole if self.parallel else self.stream  # of attention and feed-forward, or joined
        if tensor == 1:
            return outputs + self.whole
        joined = max(self.copies + self.stream, 2 * self.stream) if self.gathered else 2 * self.whole
        return outputs + self.whole + joined

    def backward(self, scores: bool, gradient: int) -> int:
        """The most that the block takes in its backward pass, its input included.

        Args:
            scores: whether what attention keeps is there from the start.
            gradient: bytes of the gradient that comes in, where it is not in a buffer that is there anyway.
        """
        first, second = self.projections
        gathered = self.whole if self.gathered else 0
        attention = self.stream + self.first_norm + 3 * self.heads + gradient
        kept = self.stream + self.kept(scores)
        return max(
            kept + gradient + gathered + self.inner + second,  # gradients of the feed-forward layer's output projection
            kept - self.masks - self.inner + gradient + (gathered if self.parallel else 0) + self.through_column(second),
            attention + self.scores + 4 * self.heads,  # gradients of queries, keys, values and output
            attention + self.through_column(first),
        )


def recomputed(config: EngineConfig, index: int) -> bool:
    """Whether the whole block `index` is computed again."""
    train = config.train
    full = train.activation_checkpointing is ActivationCheckpointing.full
    return full and index % train.activation_checkpointing_interval == 0


def activations(
    config: EngineConfig, model: ModelConfig, dims: ParallelDims, stage: int, layers: Sequence[Layer]
) -> Activations:
    """Of one micro-batch on the stage that holds `layers`."""
    assert model.vocab_size is not None
    block, item = Block.of(config, model, dims), config.train.precision.itemsize
    tokens, columns = block.whole // (model.hidden_size * item), model.vocab_size // dims.tensor
    stream, logits = block.stream, tokens * columns * item
    first, last, pipelined = stage == 0, stage == dims.pipeline - 1, dims.pipeline > 1
    scores = config.train.activation_checkpointing is not ActivationCheckpointing.selective

    kept = []  # by each layer, its input included
    for layer in layers:
        if layer.prefix == EMBEDDING:
            masked = (INT64 + 1) * tokens  # of ids that other tensor ranks have
            kept.append(masked if dims.tensor > 1 else INT64 * tokens if pipelined else 0)
        elif layer.index is not None:
            kept.append(stream + (0 if recomputed(config, layer.index) else block.kept(scores)))
        else:
            kept.append(block.first_norm if layer.prefix == FINAL_NORM else stream + logits)
    given = INT64 * tokens if first else stream
    labels = (INT64 + FP32) * tokens + 2 * FP32 if last else 0
    saved = (INT64 + 1 + (4 if dims.tensor > 1 else 3) * FP32) * tokens if last else 0  # by the loss
    total = given + sum(kept) + (labels + saved if last else stream)

    buffers = (0 if first else stream) + (0 if last else stream)
    earlier = logits if last and pipelined else 0  # those of the micro-batch before, until a third one comes
    alive, of_loss = buffers + earlier + total, earlier
    moments = [(alive, of_loss)]
    head = columns * model.hidden_size * item
    tied = head if model.tie_word_embeddings and not pipelined else 0  # waits for the embedding's gradient
    if last:
        rows = min(tokens, max(1, LOSS_CHUNK // columns))
        chunk, next_chunk = (FP32 * columns * number for number in (rows, min(rows, tokens - rows)))
        copies = 1 if item == FP32 else 2  # in fp32, and again while exponentials are taken
        working = max(copies * chunk, chunk + copies * next_chunk) + 2 * FP32 * tokens
        of_loss += 2 * logits
        moments.append((alive + logits + working, of_loss + working))
        alive -= saved + (0 if pipelined else logits)
        of_loss -= 0 if pipelined else logits
        moments.append((alive + logits + block.through_column(head), of_loss))
        of_loss -= logits
    for number, layer in enumerate(layers):
        if layer.index is not None and not recomputed(config, layer.index):
            there = buffers + earlier + given + sum(kept[: number + 1])
            moments.append((there + block.forward(dims.tensor), earlier))
    gradient = stream if last else 0  # the last layer's is in a buffer
    for layer, size in zip(reversed(layers), reversed(kept), strict=True):
        alive -= size
        if layer.index is not None:
            again = recomputed(config, layer.index)
            moments.append((alive + tied + block.backward(scores or again, gradient), of_loss))
            if again and block.masks:  # which come last, so all of the forward pass is computed again
                moments.append((alive + tied + stream + block.kept() + block.forward(dims.tensor) + gradient, of_loss))
        elif layer.prefix == EMBEDDING:
            beside = block.whole + max(head, block.copies) if dims.tensor > 1 else head
            moments.append((alive + size + tied + gradient + beside, of_loss))
        gradient = stream
    peak, logits = max(moments)
    return Activations(total, peak, logits, buffers)
