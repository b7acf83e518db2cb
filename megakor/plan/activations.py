"""What a micro-batch takes on a pipeline stage: layers go in, bytes that wait for the backward pass and their peak out.

It is what `megakor simulate` finds by running the model on fake tensors, as formulas: kept bytes are the same to the
byte, peaks are within 3 %, and within 8 % with dropout, by test. The terms of a block follow Korthikanti et al. 2022,
section 4, with what differs here: attention is fused, so its scores are never kept, but one number for each row is;
rotary embedding makes queries and keys anew; both norms of a parallel residual read one input.

Sizes are a rank's. With s tokens of the residual stream and f of whole sequences (s = f / tensor under sequence
parallelism, else f), hidden size H, feed-forward size I, t tensor ranks and i bytes a number, a block keeps

    input s·H·i     two norms 2·s·H·i     queries, keys and values 3·f·H·i/t     feed-forward 2·f·I·i/t
    attention 3·f·H·i/t (rotated queries and keys, output) and f·H·i/t (its output again, laid out for the projection)

and little: norms' statistics, attention's row sums, rotary tables.
"""

from __future__ import annotations

from dataclasses import dataclass

from megakor.config.schema import ActivationCheckpointing, EngineConfig, ModelConfig
from megakor.model.specs import EMBEDDING, HEAD
from megakor.parallel.chunks import ACCELERATOR_LOSS_CHUNK
from megakor.parallel.dims import ParallelDims
from megakor.plan.partition import Layer, Stage
from megakor.plan.work import DENSE, DOWN, FP32, LINEARS, QUERY_KEY_VALUE, UP, Adapters

INT64 = 8  # bytes


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
        norms: what the norms keep and put out, the input of the first one left out.
        first_norm: the same of the first one.
        statistics: of one norm.
        inputs: of the attention's and the feed-forward's output projections, where their weights have gradients.
        adapters: what adapters keep of their own.
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
    statistics: int
    inputs: tuple[int, int]
    adapters: int
    masks: int
    scores: int
    projections: tuple[int, int]
    gathered: bool
    copies: int
    parallel: bool

    @classmethod
    def of(cls, config: EngineConfig, model: ModelConfig, dims: ParallelDims, adapters: Adapters | None) -> Block:
        """Frozen linear layers keep no input: only a weight's gradient needs it."""
        train, item, hidden, tensor = config.train, config.train.precision.itemsize, model.hidden_size, dims.tensor
        tokens = train.micro_batch_size * train.sequence_length // dims.context
        stream_tokens = tokens // tensor if dims.sequence_parallel else tokens
        stream, whole, heads = stream_tokens * hidden * item, tokens * hidden * item, tokens * hidden // tensor * item
        inner = tokens * model.intermediate_size // tensor * item
        trained = LINEARS if adapters is None else adapters.targets
        statistics = 2 * stream_tokens * item
        first_norm = statistics + (stream if QUERY_KEY_VALUE in trained else 0)
        second_norm = statistics + (stream if UP in trained else 0) + (0 if model.use_parallel_residual else stream)
        num_masks = (1 if model.use_parallel_residual else 2) if model.hidden_dropout else 0
        rotary = int(hidden // model.num_attention_heads * model.rotary_pct)
        tables, row_sums = (
            2 * train.sequence_length * rotary * item,
            FP32 * tokens * model.num_attention_heads // tensor,
        )
        return cls(
            stream=stream,
            whole=whole,
            heads=heads,
            inner=inner,
            norms=first_norm + second_norm,
            first_norm=first_norm,
            statistics=statistics,
            inputs=(heads if DENSE in trained else 0, inner if DOWN in trained else 0),
            adapters=0 if adapters is None else len(trained) * tokens * adapters.rank * item,
            masks=num_masks * stream,
            scores=3 * heads + tables + row_sums,
            projections=(0, 0) if adapters else (3 * hidden * hidden // tensor * item, hidden * inner // tokens),
            gathered=dims.sequence_parallel,
            copies=whole if dims.sequence_parallel and train.micro_batch_size > 1 else 0,
            parallel=model.use_parallel_residual,
        )

    def kept(self, scores: bool = True) -> int:
        """Besides the input; without `scores`, attention is computed again."""
        attention = 3 * self.heads + self.inputs[0] + (self.scores if scores else 0)
        return self.norms + self.masks + attention + self.inner + self.inputs[1] + self.adapters

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
        kept = self.stream + self.kept(scores) + gradient
        before_up = kept - self.masks - self.inputs[1] + (gathered if self.parallel else 0)
        attention = self.stream + self.first_norm + 3 * self.heads + gradient
        return max(
            kept + gathered + self.inner + second,  # gradients of the feed-forward layer's output projection
            before_up + self.through_column(second),  # of its input projection
            attention + self.scores + 4 * self.heads,  # of queries, keys, values and output
            attention + self.through_column(first),
        )


@dataclass(frozen=True)
class Ends:
    """Bytes of what stands before and after the blocks of a model.

    Attributes:
        ids: of the tokens.
        masked: what the embedding keeps: ids, and which of them other tensor ranks have.
        logits: of the rank's columns of the vocabulary.
        labels: with the mask of the loss, its scale and the loss.
        saved: what the loss keeps of each token.
        working: what the loss makes besides the gradient of the logits.
        head: weights of the output projection, and as many of the embedding; 0 where they have no gradients.
    """

    ids: int
    masked: int
    logits: int
    labels: int
    saved: int
    working: int
    head: int

    @classmethod
    def of(
        cls, config: EngineConfig, model: ModelConfig, dims: ParallelDims, adapters: Adapters | None, loss_chunk: int
    ) -> Ends:
        assert model.vocab_size is not None
        train, item = config.train, config.train.precision.itemsize
        tokens = train.micro_batch_size * train.sequence_length // dims.context
        columns = model.vocab_size // dims.tensor
        rows = min(tokens, max(1, loss_chunk // columns))
        chunk, next_chunk = (FP32 * columns * number for number in (rows, min(rows, tokens - rows)))
        copies = 1 if item == FP32 else 2  # in fp32, and again while exponentials are taken
        return cls(
            ids=INT64 * tokens,
            masked=(INT64 + 1) * tokens if dims.tensor > 1 else INT64 * tokens if dims.pipeline > 1 else 0,
            logits=tokens * columns * item,
            labels=(INT64 + FP32) * tokens + 2 * FP32,
            saved=(INT64 + 1 + (4 if dims.tensor > 1 else 3) * FP32) * tokens,
            working=max(copies * chunk, chunk + copies * next_chunk) + 2 * FP32 * tokens,
            head=columns * model.hidden_size * item if adapters is None else 0,
        )


def recomputed(config: EngineConfig, layer: Layer) -> bool:
    """Whether a layer is a block that is computed again as a whole."""
    train = config.train
    full = train.activation_checkpointing is ActivationCheckpointing.full
    return full and layer.index is not None and layer.index % train.activation_checkpointing_interval == 0


def activations(
    config: EngineConfig,
    model: ModelConfig,
    dims: ParallelDims,
    stage: Stage,
    adapters: Adapters | None = None,
    loss_chunk: int = ACCELERATOR_LOSS_CHUNK,
) -> Activations:
    """Of one micro-batch on a stage.

    Args:
        adapters: what is trained; None: all weights.
        loss_chunk: logits that the loss works through at a time.
    """
    block, ends = Block.of(config, model, dims, adapters), Ends.of(config, model, dims, adapters, loss_chunk)
    stream = block.stream
    first, last, pipelined = stage.number == 0, stage.number == dims.pipeline - 1, dims.pipeline > 1
    scores = config.train.activation_checkpointing is not ActivationCheckpointing.selective

    def kept_by(layer: Layer) -> int:
        """What a layer keeps, its input included."""
        if layer.index is not None:
            return stream + (0 if recomputed(config, layer) else block.kept(scores))
        if layer.prefix == HEAD:
            return stream if adapters is None else 0
        return ends.masked if layer.prefix == EMBEDDING else stream + block.statistics

    layers = stage.layers
    kept = [kept_by(layer) for layer in layers]
    given = ends.ids if first else stream
    total = given + sum(kept) + (ends.logits + ends.labels + ends.saved if last else stream)
    buffers = (0 if first else stream) + (0 if last else stream)
    earlier = ends.logits if last and pipelined else 0  # those of the micro-batch before, until a third one comes
    moments = []  # bytes, and of them those of logits and loss
    for number, layer in enumerate(layers):
        if layer.index is not None and not recomputed(config, layer):
            there = buffers + earlier + given + sum(kept[: number + 1])
            moments.append((there + block.forward(dims.tensor), earlier))

    alive, of_loss = buffers + earlier + total, earlier
    if last:
        of_loss += 2 * ends.logits
        moments.append((alive + ends.logits + ends.working, of_loss + ends.working))
        gone = ends.saved + (0 if pipelined else ends.logits)  # DeepSpeed's pipeline holds on to its outputs
        alive, of_loss = alive - gone, of_loss - (gone - ends.saved)
        moments.append((alive + ends.logits + block.through_column(ends.head), of_loss))
        of_loss -= ends.logits
    tied = ends.head if model.tie_word_embeddings and not pipelined else 0  # waits for the embedding's gradient
    gradient = stream if last else 0  # the last layer's is in a buffer
    for layer, size in zip(reversed(layers), reversed(kept), strict=True):
        alive -= size
        if layer.index is not None:
            again = recomputed(config, layer)
            moments.append((alive + tied + block.backward(scores or again, gradient), of_loss))
            if again and block.masks:  # which come last, so all of the forward pass is computed again
                moments.append((alive + tied + stream + block.kept() + block.forward(dims.tensor) + gradient, of_loss))
        elif layer.prefix == EMBEDDING:
            beside = block.whole + max(ends.head, block.copies) if dims.tensor > 1 else ends.head
            moments.append((alive + size + tied + gradient + beside, of_loss))
        gradient = stream
    peak, of_loss = max(moments, default=(alive, of_loss))
    return Activations(total, peak, of_loss, buffers)
