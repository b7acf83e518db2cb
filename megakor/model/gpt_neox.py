"""The GPT-NeoX model: token ids go in, logits come out.

Module names are Hugging Face's, so that a parameter has one name everywhere. The same blocks serve the whole model
here and the stages of a pipeline (`megakor.parallel.pipeline`).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from megakor.config.schema import ModelConfig
from megakor.model.layers import Embedding, Linear, Linears, WholeLinears, apply_rotary, rotary_tables


class Attention(nn.Module):
    """Causal self-attention with partly rotating heads. The fused projection is laid out head by head (q, k, v)."""

    def __init__(self, config: ModelConfig, linears: Linears) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.rotary_dim = int(self.head_dim * config.rotary_pct)
        self.rotary_base = config.rotary_emb_base
        hidden_size = config.hidden_size
        self.query_key_value = linears.column(hidden_size, 3 * hidden_size, bias=config.attention_bias)
        self.dense = linears.row(hidden_size, hidden_size, bias=config.attention_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        batch, length, _ = hidden_states.shape
        fused = self.query_key_value(hidden_states).view(batch, length, -1, 3 * self.head_dim).transpose(1, 2)
        query, key, value = fused.chunk(3, dim=-1)  # [batch, heads, seq, head_dim]
        cos, sin = rotary_tables(length, self.rotary_dim, self.rotary_base, hidden_states.device)
        cos, sin = cos.to(query.dtype), sin.to(query.dtype)
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        context = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.dense(context.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig, linears: Linears) -> None:
        super().__init__()
        self.dense_h_to_4h = linears.column(config.hidden_size, config.intermediate_size, bias=True)
        self.dense_4h_to_h = linears.row(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(functional.gelu(self.dense_h_to_4h(hidden_states)))


class Block(nn.Module):
    """Attention and feed-forward around the residual, in parallel (GPT-NeoX) or one after the other."""

    def __init__(self, config: ModelConfig, linears: Linears) -> None:
        super().__init__()
        self.use_parallel_residual = config.use_parallel_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config, linears)
        self.mlp = FeedForward(config, linears)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]."""
        attended = self.attention(self.input_layernorm(hidden_states))
        if self.use_parallel_residual:
            return self.mlp(self.post_attention_layernorm(hidden_states)) + attended + hidden_states
        hidden_states = attended + hidden_states
        return self.mlp(self.post_attention_layernorm(hidden_states)) + hidden_states


class GPTNeoX(nn.Module):
    """The body: embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig, linears: Linears) -> None:
        super().__init__()
        assert config.vocab_size is not None, "the vocabulary is resolved before a model is built"
        self.embed_in = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, linears) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[batch, seq] -> [batch, seq, hidden]."""
        hidden_states = self.embed_in(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.final_layer_norm(hidden_states)


class GPTNeoXForCausalLM(nn.Module):
    """The whole model on one rank.

    Args:
        config: the architecture, with `vocab_size` resolved.
        linears: what the blocks ask for their linears.
    """

    def __init__(self, config: ModelConfig, linears: Linears | None = None) -> None:
        super().__init__()
        self.config = config
        self.gpt_neox = GPTNeoX(config, linears or WholeLinears())
        assert config.vocab_size is not None
        self.embed_out = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.embed_out.weight = self.gpt_neox.embed_in.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, seq, vocab_size] of the next token at every position of [batch, seq] ids."""
        return self.embed_out(self.gpt_neox(input_ids))
