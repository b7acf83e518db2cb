"""Sampling: greedy, nucleus, the end token, and ids past the true vocabulary."""

from __future__ import annotations

import torch

from megakor.config.schema import ModelConfig
from megakor.generate.sampling import continuation, pick
from megakor.model.gpt_neox import GPTNeoXForCausalLM
from megakor.model.parameters import initialize_parameters

CONFIG = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64, rotary_pct=0.5,
    max_position_embeddings=16,
)  # fmt: skip


def model() -> GPTNeoXForCausalLM:
    built = GPTNeoXForCausalLM(CONFIG)
    initialize_parameters(built.named_parameters(), CONFIG, seed=1)
    return built.eval()


def speak(built: GPTNeoXForCausalLM, ids: list[int], seed: int = 0, **changes) -> list[int]:
    settings = {"num_tokens": 50, "eod_id": 0, "max_new_tokens": 24, "temperature": 1.0, "top_p": 1.0} | changes
    return continuation(built, ids, generator=torch.Generator().manual_seed(seed), **settings)


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    drawn = {pick(logits, 1.0, 0.7, torch.Generator().manual_seed(seed)) for seed in range(200)}
    assert drawn == {0, 1}
    assert {pick(logits, 1.0, 1e-9, torch.Generator().manual_seed(seed)) for seed in range(50)} == {0}
    assert {pick(logits, 1.0, 1.0, torch.Generator().manual_seed(seed)) for seed in range(400)} == {0, 1, 2, 3}
    assert pick(logits, 0.0, 1.0, torch.Generator()) == 0


def test_rows_past_the_true_vocabulary_are_never_picked() -> None:
    built = model()
    with torch.no_grad():
        built.embed_out.weight[50:] *= 1000.0  # padding rows that would win everywhere
    for seed in range(10):
        assert max(speak(built, [1, 2, 3], seed)) < 50


def test_greedy_equals_the_argmax_step_by_step_and_windows_slide() -> None:
    built = model()
    ids = [5, 6, 7]
    new = speak(built, ids, temperature=0.0)
    for index, token in enumerate(new):
        known = (ids + new[:index])[-CONFIG.max_position_embeddings :]
        assert token == int(built(torch.tensor([known]))[0, -1, :50].argmax())


def test_end_token_stops_and_is_left_out_and_an_empty_prompt_starts_a_document() -> None:
    built = model()
    first = speak(built, [], temperature=0.0, max_new_tokens=1)
    assert speak(built, [0], temperature=0.0, max_new_tokens=1) == first
    assert speak(built, [], temperature=0.0, eod_id=0, max_new_tokens=3)[:1] == first
    ended = speak(built, [5], temperature=0.0, eod_id=speak(built, [5], temperature=0.0)[0])
    assert ended == []


def test_same_seed_same_text() -> None:
    built = model()
    assert speak(built, [1], 3) == speak(built, [1], 3)
    assert speak(built, [1], 3) != speak(built, [1], 4)
