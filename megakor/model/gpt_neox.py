"""The GPT-NeoX model: token ids go in, logits come out.

Module names are Hugging Face's, so that a parameter has one name everywhere. The same modules serve the whole model
here and the stages of a pipeline (`megakor.parallel.pipeline`). `Parts` says what they are made of: whole layers or a
tensor rank's shards, what is recomputed in the backward pass, what seeds dropout, and where documents begin.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megakor.config.schema import ActivationCheckpointing, ModelConfig
from megakor.model.documents import Borders, Documents
from megakor.model.dropout import DropoutCounter
from megakor.model.layers import Layers, WholeLayers, apply_rotary, rotary_tables


@dataclass(frozen=True)
class Parts:
    """What the model's modules are made of, besides the architecture.

    Attributes:
        layers: makes the layers.
        checkpointing: what the backward pass computes again instead of keeping it.
        interval: with `full`, every so many blocks one is recomputed.
        counter: seeds dropout.
        documents: the documents of the rows at work.
    """

    layers: Layers = field(default_factory=WholeLayers)
    checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    interval: int = 1
    counter: DropoutCounter = field(default_factory=DropoutCounter)
    documents: Documents = field(default_factory=Documents)

    def next_micro_batch(self) -> None:
        """Count a forward pass."""
        self.counter.next_micro_batch()
        self.documents.next_micro_batch()


class Attention(nn.Module):
    """Causal self-attention with partly rotating heads. The fused projection is laid out head by head (q, k, v)."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.rotary_dim = int(self.head_dim * config.rotary_pct)
        self.rotary_base = config.rotary_emb_base
        self.dropout = config.attention_dropout
        self.layers, self.counter, self.documents = parts.layers, parts.counter, parts.documents
        self.recomputed = parts.checkpointing is ActivationCheckpointing.selective
        hidden_size = config.hidden_size
        self.query_key_value = parts.layers.column(hidden_size, 3 * hidden_size, bias=config.attention_bias)
        self.dense = parts.layers.row(hidden_size, hidden_size, bias=config.attention_bias)

    def forward(
        self, hidden_states: torch.Tensor, key: int | None = None, borders: Borders | None = None
    ) -> torch.Tensor:
        """[batch, seq of this rank, hidden] -> the same, to be joined.

        Args:
            key: seed of the dropout of attention weights; None: no dropout.
            borders: of the rows' documents; None: rows are one stretch.
        """
        fused = self.query_key_value(hidden_states)
        fused = fused.unflatten(2, (-1, 3 * self.head_dim))  # [batch, seq, heads, 3 × head_dim]
        attend = partial(self.attend, key=key, borders=borders)
        if self.recomputed and torch.is_grad_enabled():
            context = self.layers.attend(partial(recompute, attend), fused)
        else:
            context = self.layers.attend(attend, fused)
        return self.dense(context.flatten(2))

    def attend(self, fused: torch.Tensor, key: int | None, borders: Borders | None = None) -> torch.Tensor:
        """Whole sequences [batch, seq, heads, 3 × head_dim] -> [batch, seq, heads, head_dim]."""
        query, key_states, value = fused.transpose(1, 2).chunk(3, dim=-1)  # [batch, heads, seq, head_dim]
        cos, sin = rotary_tables(fused.shape[1], self.rotary_dim, self.rotary_base, fused.device)
        cos, sin = cos.to(fused.dtype), sin.to(fused.dtype)
        if borders is not None:
            cos, sin = (table[borders.positions].unsqueeze(1) for table in (cos, sin))  # [batch, 1, seq, rotary_dim]
        query, key_states = apply_rotary(query, cos, sin), apply_rotary(key_states, cos, sin)
        dropout = 0.0 if key is None else self.dropout
        with nullcontext() if key is None else self.counter.seeded(key):
            if borders is None:
                context = functional.scaled_dot_product_attention(
                    query, key_states, value, dropout_p=dropout, is_causal=True
                )
                return context.transpose(1, 2)
            query, key_states, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key_states, value))
            return self.documents.attend(query, key_states, value, borders, dropout).unflatten(0, fused.shape[:2])


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig, layers: Layers) -> None:
        super().__init__()
        self.dense_h_to_4h = layers.column(config.hidden_size, config.intermediate_size, bias=True)
        self.dense_4h_to_h = layers.row(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, seq of this rank, hidden] -> the same, to be joined."""
        return self.dense_4h_to_h(functional.gelu(self.dense_h_to_4h(hidden_states)))


class Block(nn.Module):
    """Attention and feed-forward around the residual, in parallel (GPT-NeoX) or one after the other.

    In parallel, both outputs are joined at once: one reduction instead of two.

    Args:
        index: of the block in the model, from 0.
    """

    def __init__(self, config: ModelConfig, parts: Parts, index: int) -> None:
        super().__init__()
        self.use_parallel_residual = config.use_parallel_residual
        self.hidden_dropout, self.attention_dropout = config.hidden_dropout, config.attention_dropout
        self.layers, self.counter, self.index = parts.layers, parts.counter, index
        self.documents = parts.documents
        self.recomputed = parts.checkpointing is ActivationCheckpointing.full and index % parts.interval == 0
        self.input_layernorm = parts.layers.norm(config.hidden_size, config.layer_norm_eps)
        self.post_attention_layernorm = parts.layers.norm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config, parts)
        self.mlp = FeedForward(config, parts.layers)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, seq of this rank, hidden] -> the same."""
        # Taken now: a recomputation comes when the micro-batches have gone on.
        keys, borders = self.dropout_keys(), self.documents.current
        if self.recomputed and torch.is_grad_enabled():
            return recompute(partial(self.compute, keys=keys, borders=borders), hidden_states)
        return self.compute(hidden_states, keys, borders)

    def dropout_keys(self) -> tuple[int | None, int | None, int | None]:
        """The seeds of this pass's masks: of attention weights, and of the two branches' outputs."""

        def key(place: str, probability: float, part: int) -> int | None:
            return self.counter.key(f"{self.index}.{place}", part) if self.training and probability else None

        counter, hidden = self.counter, self.hidden_dropout
        return (
            key("attention", self.attention_dropout, counter.heads),
            key("attention.dense", hidden, counter.residual),
            key("mlp", hidden, counter.residual),
        )

    def compute(
        self, hidden_states: torch.Tensor, keys: tuple[int | None, int | None, int | None], borders: Borders | None
    ) -> torch.Tensor:
        weights_key, attention_key, mlp_key = keys
        attended = self.attention(self.input_layernorm(hidden_states), weights_key, borders)
        if self.use_parallel_residual:
            fed = self.mlp(self.post_attention_layernorm(hidden_states))
            both = self.layers.join(fed + attended, self.attention.dense, self.mlp.dense_4h_to_h)
            return self.counter.dropout(both, self.hidden_dropout, mlp_key) + hidden_states
        attended = self.layers.join(attended, self.attention.dense)
        hidden_states = self.counter.dropout(attended, self.hidden_dropout, attention_key) + hidden_states
        fed = self.layers.join(self.mlp(self.post_attention_layernorm(hidden_states)), self.mlp.dense_4h_to_h)
        return self.counter.dropout(fed, self.hidden_dropout, mlp_key) + hidden_states


def recompute(function: Callable[[torch.Tensor], torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
    """`function(hidden_states)`, keeping its input and computing it again in the backward pass."""
    return checkpoint(function, hidden_states, use_reentrant=False, preserve_rng_state=False)


class GPTNeoX(nn.Module):
    """The body: embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the vocabulary is resolved before a model is built"
        self.embed_in = parts.layers.embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, parts, index) for index in range(config.num_hidden_layers))
        self.final_layer_norm = parts.layers.norm(config.hidden_size, config.layer_norm_eps)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[batch, seq] -> [batch, seq of this rank, hidden]."""
        hidden_states = self.embed_in(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.final_layer_norm(hidden_states)


class GPTNeoXForCausalLM(nn.Module):
    """The model without a pipeline.

    Args:
        config: the architecture, with `vocab_size` resolved.
        parts: what it is made of; None: whole layers in fp32.
    """

    def __init__(self, config: ModelConfig, parts: Parts | None = None) -> None:
        super().__init__()
        self.config, self.parts = config, parts or Parts()
        self.gpt_neox = GPTNeoX(config, self.parts)
        assert config.vocab_size is not None
        if not config.tie_word_embeddings:
            self.embed_out = self.parts.layers.column(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, seq, vocab_size of this rank] of the next token at every position of [batch, seq] ids."""
        self.parts.next_micro_batch()
        hidden_states = self.gpt_neox(input_ids)
        project = self.gpt_neox.embed_in.project if self.config.tie_word_embeddings else self.embed_out
        return project(hidden_states)
