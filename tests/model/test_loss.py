from __future__ import annotations

import math

import pytest
import torch

from megakor.model.gpt_neox import GPTNeoXForCausalLM
from megakor.model.loss import token_losses
from megakor.model.parameters import initialize_parameters
from megakor.parallel.loss import VocabularyShard, vocabulary_loss
from tests.model.configs import small

NUM_TOKENS = 50  # of 64 rows
SHARD = VocabularyShard(0, NUM_TOKENS, None, 2**10)


@pytest.mark.parametrize("tied", [False, True])
def test_padded_rows_take_no_probability_and_get_no_gradient(tied: bool) -> None:
    config = small(tie_word_embeddings=tied)
    model = GPTNeoXForCausalLM(config)
    initialize_parameters(model.named_parameters(), config, 0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, NUM_TOKENS, (4, 33), generator=generator)
    inputs, labels = ids[:, :-1], ids[:, 1:]

    def loss() -> torch.Tensor:
        return vocabulary_loss(model(inputs), labels, torch.ones(labels.shape), torch.tensor(1 / 128), SHARD)

    before = loss()
    before.backward()
    embedding = model.gpt_neox.embed_in.weight
    head = embedding if tied else model.embed_out.weight
    assert head.grad is not None
    assert not head.grad[NUM_TOKENS:].any()
    assert head.grad[:NUM_TOKENS].abs().sum(1).min() > 0
    assert embedding.grad is not None
    assert not embedding.grad[NUM_TOKENS:].any()
    with torch.no_grad():
        head[NUM_TOKENS:] = 1000.0
    assert torch.equal(loss(), before)


def test_probabilities_of_the_true_vocabulary_sum_to_one() -> None:
    logits = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0)) * 3
    losses = [token_losses(logits, torch.tensor([[label]]), NUM_TOKENS).item() for label in range(NUM_TOKENS)]
    assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1.0, abs=1e-5)


def test_the_loss_is_a_scaled_sum_over_unmasked_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 64, generator=generator), torch.randint(0, 50, (2, 5), generator=generator)
    mask = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0], [0.0] * 5])
    expected = 0.0
    for row, column in [(0, 0), (0, 2), (0, 3)]:
        expected -= torch.log_softmax(logits[row, column, :50].double(), 0)[labels[row, column]].item()
    found = vocabulary_loss(logits, labels, mask, torch.tensor(0.25), SHARD)
    assert found.item() == pytest.approx(0.25 * expected, rel=1e-6)
    assert token_losses(logits, labels, NUM_TOKENS).shape == (2, 5)


def test_masked_tokens_get_no_gradient() -> None:
    logits = torch.randn(1, 4, 64, requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    vocabulary_loss(logits, torch.zeros(1, 4, dtype=torch.long), mask, torch.tensor(1.0), SHARD).backward()
    assert logits.grad is not None
    assert not logits.grad[0, [1, 3]].any()
    assert logits.grad[0, [0, 2], :NUM_TOKENS].all()


def test_half_precision_logits_are_summed_in_fp32() -> None:
    logits = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([[1, 2, 3]])
    found = token_losses(logits, labels, NUM_TOKENS)
    assert found.dtype == torch.float32
    assert torch.equal(found, token_losses(logits.float(), labels, NUM_TOKENS))
