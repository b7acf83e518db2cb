"""Models that transformers writes: GPT-NeoX of any settings, with weights large enough for logits to show them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from megakor.tokenizer.tokenizer import Tokenizer

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def write_model(
    folder: Path, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **changes: Any
) -> GPTNeoXForCausalLM:
    """Have transformers write a model with the tokenizer's rows; its files alone, no tokenizer."""
    config = GPTNeoXConfig(**{**SMALL, "vocab_size": tokenizer.vocab_size, **changes})
    model = GPTNeoXForCausalLM(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.copy_(values + 1.0 if name.endswith("norm.weight") else values)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def edit_config(folder: Path, *gone: str, **changes: Any) -> None:
    """Change keys of a folder's `config.json`, and take keys out."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in gone}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a folder's single file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
