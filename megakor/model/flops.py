"""Floating-point operations of training, for MFU."""

from __future__ import annotations

from megakor.config.schema import LoraConfig, ModelConfig
from megakor.model.lora import num_adapter_parameters
from megakor.model.specs import num_parameters


def train_flops_per_token(config: ModelConfig, sequence_length: int, lora: LoraConfig | None = None) -> float:
    """Model FLOPs of one token's forward and backward pass: 6N + 12·L·H·Q·T (PaLM, Chowdhery et al. 2022, appendix B).

    N leaves out the input embedding, a look-up; the attention term counts the whole square, as PaLM does.
    Recomputation is not counted. With adapters, a third of 6N, the gradients of frozen weights, falls away:
    4N + 6 times the adapters' parameters.
    """
    assert config.vocab_size is not None
    parameters = num_parameters(config)
    if not config.tie_word_embeddings:
        parameters -= config.vocab_size * config.hidden_size
    weights = 6.0 * parameters if lora is None else 4.0 * parameters + 6.0 * num_adapter_parameters(config, lora)
    return weights + 12.0 * config.num_hidden_layers * config.hidden_size * sequence_length
