"""The language-model loss: a sum over unmasked tokens, scaled by the caller."""

from __future__ import annotations

import torch
from torch.nn import functional


def token_losses(logits: torch.Tensor, labels: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Negative log-likelihood of each label in nats, fp32.

    Args:
        logits: [batch, seq, vocab_size]; rows from `num_tokens` on are padding and take no probability.
        labels: [batch, seq] ids below `num_tokens`.
        num_tokens: the true vocabulary.

    Returns:
        [batch, seq].
    """
    real = logits[..., :num_tokens].float()
    return functional.cross_entropy(real.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
