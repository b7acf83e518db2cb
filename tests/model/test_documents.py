"""Several documents in a row: each is as if alone, as in transformers, and where activations are recomputed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.attention import varlen

from megakor.config.schema import ActivationCheckpointing, ModelConfig
from megakor.model import documents
from megakor.model.documents import Borders, Documents, all_at_once, one_by_one
from megakor.model.dropout import DropoutCounter
from megakor.model.gpt_neox import GPTNeoXForCausalLM, Parts
from tests.model.configs import small
from tests.model.test_against_transformers import pair

LENGTHS = [[13, 1, 20, 6], [40], [5, 35]]
"""Of the documents of each row."""

DOCUMENTS = torch.tensor([[n for n, length in enumerate(row) for _ in range(length)] for row in LENGTHS])
IDS = torch.randint(0, 64, DOCUMENTS.shape, generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "parallel": small(),
    "in turn, tied": small(use_parallel_residual=False, tie_word_embeddings=True),
    "rotary 1": small(rotary_pct=1.0),
}


def pieces() -> Iterator[tuple[int, slice]]:
    """Row and span of each document."""
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            yield row, slice(start, start + length)
            start += length


def logits(model: GPTNeoXForCausalLM, ids: torch.Tensor, numbers: torch.Tensor | None = None) -> torch.Tensor:
    model.parts.documents.start([None if numbers is None else Borders.of(numbers)])
    return model(ids)


def test_borders() -> None:
    found = Borders.of(torch.tensor([[0, 0, 1, 1, 1], [4, 4, 4, 9, 9], [9, 9, 9, 9, 9]], dtype=torch.int32))
    assert found.positions.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert found.starts.tolist() == [0, 2, 5, 8, 10, 15]
    assert (found.positions.dtype, found.starts.dtype) == (torch.int64, torch.int32)
    assert (found.lengths, found.longest) == ([2, 3, 3, 2, 5], 5)
    moved: list[torch.Tensor] = []
    Borders.of(DOCUMENTS, lambda tensor: moved.append(tensor) or tensor)  # type: ignore[func-returns-value]
    assert [tensor.shape for tensor in moved] == [DOCUMENTS.shape, (8,)]


@pytest.mark.parametrize("name", CONFIGS)
def test_each_document_is_as_if_alone(name: str) -> None:
    model, _ = pair(CONFIGS[name])
    with torch.no_grad():
        packed, whole = logits(model, IDS, DOCUMENTS), logits(model, IDS)
        for row, span in pieces():
            alone = logits(model, IDS[row : row + 1, span])
            assert (packed[row, span] - alone[0]).abs().max() < 1e-5
    assert (packed[0, 13:] - whole[0, 13:]).abs().max() > 1e-2  # borders matter


@pytest.mark.parametrize("name", CONFIGS)
def test_as_transformers_with_a_mask_and_positions(name: str) -> None:
    ours, theirs = pair(CONFIGS[name])
    borders = Borders.of(DOCUMENTS)
    same = DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None, :]
    mask = same & torch.ones(40, 40, dtype=torch.bool).tril()  # [batch, 1, seq, seq]
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = theirs(IDS, attention_mask=additive, position_ids=borders.positions).logits
        assert (logits(ours, IDS, DOCUMENTS) - expected).abs().max() < 1e-5


def test_no_gradient_crosses_a_border() -> None:
    model, _ = pair(small())
    embedded: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    model.gpt_neox.embed_in.register_forward_hook(keep)
    for row, span in pieces():
        logits(model, IDS, DOCUMENTS)[row, span].square().sum().backward()
        gradient = embedded.pop().grad
        assert gradient is not None
        assert gradient[row, span].abs().sum(-1).min() > 0
        gradient[row, span] = 0.0
        assert torch.count_nonzero(gradient) == 0


def test_one_document_a_row_is_the_row() -> None:
    model, _ = pair(small())
    with torch.no_grad():
        assert (logits(model, IDS, torch.zeros_like(DOCUMENTS)) - logits(model, IDS)).abs().max() < 1e-5


def test_rows_of_one_stretch_need_none_of_this() -> None:
    def never(*_: Any) -> torch.Tensor:
        raise AssertionError

    model, _ = pair(small())
    other = GPTNeoXForCausalLM(small(), Parts(documents=Documents(attend=never)))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(IDS), logits(other, IDS))


def test_more_passes_than_micro_batches_are_a_mistake() -> None:
    model, _ = pair(small())
    logits(model, IDS, DOCUMENTS)
    with pytest.raises(AssertionError, match="a forward pass more"):
        model(IDS)


DROPOUT = small(hidden_dropout=0.1, attention_dropout=0.1)
SEVERAL = (DOCUMENTS, DOCUMENTS.flip(0), None, DOCUMENTS.flip(1).neg())
"""Of the micro-batches of a step."""


def gradients(
    config: ModelConfig, kind: ActivationCheckpointing, numbers: tuple[torch.Tensor | None, ...] = SEVERAL
) -> dict[str, torch.Tensor]:
    """Of the micro-batches of a step; all forward passes come first, as in a pipeline."""
    model = GPTNeoXForCausalLM(config, Parts(checkpointing=kind, counter=DropoutCounter(seed=4))).train()
    model.load_state_dict(pair(config)[0].state_dict())
    model.parts.counter.start_step(6)
    model.parts.documents.start(None if each is None else Borders.of(each) for each in numbers)
    for output in [model(IDS) for _ in numbers]:
        output.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}  # type: ignore[misc]


@pytest.mark.parametrize("kind", [ActivationCheckpointing.full, ActivationCheckpointing.selective])
@pytest.mark.parametrize("config", [small(), DROPOUT], ids=["plain", "dropout"])
def test_recomputed_gradients_are_the_same_bits(config: ModelConfig, kind: ActivationCheckpointing) -> None:
    expected, found = gradients(config, ActivationCheckpointing.none), gradients(config, kind)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def test_borders_of_another_micro_batch_would_show() -> None:
    name = "gpt_neox.layers.1.attention.query_key_value.weight"
    none = ActivationCheckpointing.none
    right, other = (gradients(small(), none, numbers)[name] for numbers in (SEVERAL, (DOCUMENTS, *SEVERAL[:3])))
    assert (right - other).abs().max() > 1e-2 * right.abs().max()


def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Attention over [tokens, heads, head_dim] with a mask of the spans that begin at `starts`."""
    numbers = torch.searchsorted(starts, torch.arange(len(query)), right=True)
    mask = (numbers[:, None] == numbers) & torch.ones(len(query), len(query), dtype=torch.bool).tril()
    states = (part.transpose(0, 1)[None] for part in (query, key, value))
    return functional.scaled_dot_product_attention(*states, attn_mask=mask)[0].transpose(0, 1)


def tokens(head_dim: int, **kind: Any) -> list[torch.Tensor]:
    """Query, key and value of every token of the rows."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(DOCUMENTS.numel(), 4, head_dim, generator=generator).to(**kind) for _ in range(3)]


def test_one_by_one_is_attention_with_a_mask() -> None:
    borders, states = Borders.of(DOCUMENTS), tokens(24)
    torch.testing.assert_close(one_by_one(*states, borders, 0.0), masked(*states, borders.starts), rtol=0, atol=2e-6)


def test_all_at_once_hands_the_kernel_the_same_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(varlen.varlen_attn)

    def kernel(*arguments: Any, **named: Any) -> torch.Tensor:
        given = signature.bind(*arguments, **named).arguments
        calls.append(given)
        return masked(given["query"], given["key"], given["value"], given["cu_seq_q"])

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    borders, states = Borders.of(DOCUMENTS), tokens(24)
    found = all_at_once(*states, borders, 0.0)
    torch.testing.assert_close(found, one_by_one(*states, borders, 0.0), rtol=0, atol=2e-6)
    (given,) = calls
    assert given["cu_seq_q"] is given["cu_seq_k"] is borders.starts
    assert (given["max_q"], given["max_k"], given["window_size"]) == (40, 40, (-1, 0))
    for head_dim, dropout in ((24, 0.1), (12, 0.0), (264, 0.0)):  # what it cannot
        all_at_once(*tokens(head_dim), borders, dropout)
    assert len(calls) == 1


def test_all_at_once_has_the_kernels_shapes_and_types() -> None:
    """On fake tensors, backward pass included: the kernel itself is a GPU's."""
    borders = Borders.of(DOCUMENTS)
    with FakeTensorMode(allow_non_fake_inputs=True):
        states = [states.requires_grad_() for states in tokens(24, dtype=torch.bfloat16)]
        context = all_at_once(*states, borders, 0.0)
        assert (context.shape, context.dtype) == (states[0].shape, torch.bfloat16)
        context.sum().backward()
        assert all(part.grad is not None and part.grad.shape == part.shape for part in states)


def test_what_attends_is_the_parts_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Borders] = []

    def attend(*arguments: Any) -> torch.Tensor:
        calls.append(arguments[3])
        return documents.one_by_one(*arguments)

    config = small()
    model = GPTNeoXForCausalLM(config, Parts(documents=Documents(attend)))
    model.load_state_dict(pair(config)[0].state_dict())
    with torch.no_grad():
        found = logits(model, IDS, DOCUMENTS)
        assert torch.equal(found, logits(pair(config)[0], IDS, DOCUMENTS))
    assert len(calls) == config.num_hidden_layers
    assert all(borders is calls[0] for borders in calls)
