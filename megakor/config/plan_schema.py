"""The configuration's types of what a plan needs to know besides the run."""

from __future__ import annotations

from dataclasses import dataclass

from megakor.config.fields import key

LORA_TARGETS = "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"
"""A block's linear layers."""


@dataclass
class LoraConfig:
    """LoRA (Hu et al. 2021): the weights are frozen, and thin matrices beside some linear layers are trained."""

    rank: int | None = key(None, help="of the matrices; null: all weights are trained, without LoRA")
    targets: list[str] = key(
        ["query_key_value"], help="of query_key_value, dense, dense_h_to_4h, dense_4h_to_h: the layers that get them"
    )
