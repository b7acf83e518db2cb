"""Small architectures that differ in everything that changes the arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megakor.config.schema import ModelConfig

BASE = ModelConfig(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=96,
    vocab_size=64,
    max_position_embeddings=64,
    rotary_pct=0.5,
)


def small(**changes: Any) -> ModelConfig:
    return replace(BASE, **changes)
