"""What a micro-batch takes on a pipeline stage: the layers go in, bytes that wait for the backward pass and their peak out.

It is what `megakor simulate` finds by running the model on fake tensors, as formulas: kept bytes are the same to the byte,
peaks to within 3 % (tests/plan/test_activations.py). The terms of a block follow Korthikanti et al. 2022, section 4,
with what differs: attention is fused, so its scores are never kept but one number for each row is; rotary embedding
keeps queries and keys twice; both norms of a parallel residual read one input; there are no dropout masks by default.

Every size is a rank's. With s tokens of the residual stream, f tokens in whole sequences (s = f, or f / tensor under
sequence parallelism), hidden size H, feed-forward size I, tensor ranks t and i bytes a number, a block keeps

    input s·H·i   norms 2·s·H·i   query, key, value 3·f·H·i/t   rotated 2·f·H·i/t   attention 2·f·H·i/t
    feed-forward 2·f·I·i/t   and the small: norm statistics 4·s·i, row sums 4·f·heads/t, rotary tables
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megakor.config.schema import ActivationCheckpointing, EngineConfig, ModelConfig
from megakor.model.specs import EMBEDDING, FINAL_NORM, HEAD
from megakor.parallel.dims import ParallelDims
from megakor.plan.partition import Layer

LOSS_CHUNK = 2**27
"""Logits that the loss works through at a time on accelerators (`megakor.train.device`)."""
FP32, INT64 = 4, 8  # bytes


@dataclass(frozen=True)
class Sizes:
    """Bytes of a micro-batch's tensors on a rank.

    Attributes:
        tokens: of whole sequences, and of the rank's part of the residual stream.
        stream: hidden states of the residual stream.
        whole: hidden states of whole sequences.
        heads: the same of the rank's heads alone.
        inner: states of the feed-forward layer.
        logits: of the rank's columns of the vocabulary.
    """

    tokens: int
    stream_tokens: int
    stream: int
    whole: int
    heads: int
    inner: int
    logits: int

    @classmethod
    def of(cls, config: EngineConfig, model: ModelConfig, dims: ParallelDims) -> Sizes:
        assert model.vocab_size is not None
        item = config.train.precision.itemsize
        tokens = config.train.micro_batch_size * config.train.sequence_length // dims.context
        stream_tokens = tokens // dims.tensor if dims.sequence_parallel else tokens
        return cls(
            tokens=tokens,
            stream_tokens=stream_tokens,
            stream=stream_tokens * model.hidden_size * item,
            whole=tokens * model.hidden_size * item,
            heads=tokens * model.hidden_size // dims.tensor * item,
            inner=tokens * model.intermediate_size // dims.tensor * item,
            logits=tokens * model.vocab_size // dims.tensor * item,
        )


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on a rank of a stage.

    Attributes:
        kept: from its forward pass to its backward pass.
        peak: the most at once, with the buffers for neighbours.
        logits: of the peak, what belongs to the logits and the loss.
        buffers: of the peak, what DeepSpeed's pipeline holds besides: what neighbours sent, and its copies.
    """

    kept: int
    peak: int
    logits: int
    buffers: int


@dataclass(frozen=True)
class BlockBytes:
    """What a block keeps besides its input.

    Attributes:
        whole: when nothing is computed again.
        kept: from the forward pass to the backward pass; nothing where the whole block is computed again.
    """

    whole: int
    kept: int


def block_bytes(config: EngineConfig, model: ModelConfig, dims: ParallelDims, index: int) -> BlockBytes:
    """What block `index` keeps besides its input."""
    sizes, train, item = Sizes.of(config, model, dims), config.train, config.train.precision.itemsize
    rotary = int(model.hidden_size // model.num_attention_heads * model.rotary_pct)
    norms = 2 * sizes.stream + 2 * 2 * sizes.stream_tokens * item
    if not model.use_parallel_residual:
        norms += sizes.stream  # the second norm's input is its own
    masks = (1 if model.use_parallel_residual else 2) * sizes.stream if model.hidden_dropout else 0
    attention = (
        2 * sizes.heads  # rotated queries and keys
        + 2 * train.sequence_length * rotary * item  # cosine and sine
        + sizes.heads  # the output
        + FP32 * sizes.tokens * model.num_attention_heads // dims.tensor  # log-sum-exps
    )
    rest = norms + masks + 3 * sizes.heads + sizes.heads + 2 * sizes.inner
    checkpointing = train.activation_checkpointing
    if checkpointing is ActivationCheckpointing.selective:
        return BlockBytes(rest + attention, rest)
    recomputed = index % train.activation_checkpointing_interval == 0
    if checkpointing is ActivationCheckpointing.full and recomputed:
        return BlockBytes(rest + attention, 0)
    return BlockBytes(rest + attention, rest + attention)


def activations(
    config: EngineConfig, model: ModelConfig, dims: ParallelDims, stage: int, layers: Sequence[Layer]
) -> Activations:
    """Of one micro-batch on the stage that holds `layers`."""
    sizes, item = Sizes.of(config, model, dims), config.train.precision.itemsize
    stream, f = sizes.stream, sizes.tokens
    first, last, pipelined = stage == 0, stage == dims.pipeline - 1, dims.pipeline > 1
    names = [layer.prefix for layer in layers]
    sent = (0 if first else stream) + (0 if last else stream)
    earlier = sizes.logits if last and pipelined else 0  # of the micro-batch before

    # What the passes keep, layer by layer.
    received = INT64 * f if first else stream
    kept: dict[str, int] = {}
    whole: dict[str, int] = {}
    for layer in layers:
        if layer.prefix == EMBEDDING:
            kept[layer.prefix] = (INT64 + 1) * f if dims.tensor > 1 else INT64 * f if pipelined else 0
        elif layer.kind == "Block":
            found = block_bytes(config, model, dims, int(layer.prefix.rpartition(".")[2]))
            kept[layer.prefix], whole[layer.prefix] = stream + found.kept, stream + found.whole
        elif layer.prefix == FINAL_NORM:
            kept[layer.prefix] = stream + 2 * sizes.stream_tokens * item
        else:
            kept[layer.prefix] = stream + sizes.logits
    labels = (INT64 + FP32) * f if last else 0
    saved = (INT64 + 1 + 2 * FP32 + (2 if dims.tensor > 1 else 1) * FP32) * f if last else 0  # by the loss
    scalars = 2 * FP32 if last else 0
    total = received + sum(kept.values()) + labels + saved + scalars + (0 if last else stream)

    # The fullest moments of the backward pass.
    moments: list[tuple[int, int]] = []  # bytes, and of them those of logits and loss
    alive = sent + earlier + total
    if last:
        columns = model.vocab_size // dims.tensor
        chunk = FP32 * columns * min(f, max(1, LOSS_CHUNK // columns))
        extra = sizes.logits + 2 * chunk + 3 * FP32 * f
        of_loss = earlier + sizes.logits + extra
        moments.append((alive + extra, of_loss))
        gone = saved + (0 if pipelined else sizes.logits)
        gradient = sizes.logits + (sizes.whole * (3 if dims.sequence_parallel else 1)) + columns * model.hidden_size * item
        moments.append((alive - gone + gradient, of_loss - 2 * chunk - sizes.logits))
        alive -= gone + stream
    for layer in reversed(layers):
        if layer.kind == "Block":
            weight = model.intermediate_size * model.hidden_size // dims.tensor * item
            beside = stream + (sizes.whole if dims.sequence_parallel else 0) + sizes.inner + weight
            moments.append((alive + whole[layer.prefix] - kept[layer.prefix] + beside, earlier))
        alive -= kept[layer.prefix]
    peak, logits = max(moments) if moments else (alive, 0)
    return Activations(total, peak, logits, sent)
