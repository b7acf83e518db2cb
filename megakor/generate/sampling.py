"""Sampling: a model and ids go in, new ids come out. One process, the whole model on one device."""

from __future__ import annotations

import torch

from megakor.model.gpt_neox import GPTNeoXForCausalLM


def pick(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token from the logits [num_tokens] of the true vocabulary; greedy at temperature 0.

    Nucleus sampling (Holtzman et al. 2020): only the smallest set of tokens whose probability reaches `top_p` counts.
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities
    probabilities[before >= top_p] = 0.0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def continuation(
    model: GPTNeoXForCausalLM,
    ids: list[int],
    *,
    num_tokens: int,
    eod_id: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
) -> list[int]:
    """New ids after `ids`, up to the end token (left out) or `max_new_tokens`.

    Args:
        model: in evaluation mode.
        ids: the prompt; empty: the start of a document.
        num_tokens: true vocabulary; rows past it are never picked.
    """
    longest = model.config.max_position_embeddings
    known = list(ids) or [eod_id]
    start = len(known)
    place = next(model.parameters()).device
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([known[-longest:]], device=place))[0, -1, :num_tokens].float().cpu()
        token = pick(logits, temperature, top_p, generator)
        if token == eod_id:
            break
        known.append(token)
    return known[start:]
