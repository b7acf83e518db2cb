"""Recomputed activations: the same gradients to the bit, less kept, and only what was asked for is computed again."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from megakor.config.schema import ActivationCheckpointing, ModelConfig
from megakor.model.dropout import DropoutCounter
from megakor.model.gpt_neox import Attention, Block, GPTNeoXForCausalLM, Parts
from megakor.model.parameters import initialize_parameters
from tests.model.configs import small

NONE, FULL, SELECTIVE = (ActivationCheckpointing(name) for name in ("none", "full", "selective"))
KINDS = [(FULL, 1), (FULL, 2), (FULL, 3), (SELECTIVE, 1)]
LAYERS = 4
CONFIGS = {
    "plain": small(num_hidden_layers=LAYERS),
    "dropout": small(num_hidden_layers=LAYERS, hidden_dropout=0.1, attention_dropout=0.1),
    "in turn, dropout": small(num_hidden_layers=LAYERS, hidden_dropout=0.3, use_parallel_residual=False),
}
IDS = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))


def model_of(config: ModelConfig, kind: ActivationCheckpointing, interval: int = 1) -> GPTNeoXForCausalLM:
    model = GPTNeoXForCausalLM(config, Parts(checkpointing=kind, interval=interval, counter=DropoutCounter(seed=4)))
    initialize_parameters(model.named_parameters(), replace(config, initializer_range=0.1), seed=1)
    return model.train()


def gradients(model: GPTNeoXForCausalLM) -> dict[str, torch.Tensor]:
    """Of two micro-batches of a step; both forward passes come first, as in a pipeline."""
    model.parts.counter.start_step(6)
    first, second = model(IDS), model(IDS.flip(0))
    first.logsumexp(-1).sum().backward()
    second.square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}  # type: ignore[misc]


@functools.cache
def kept_gradients(name: str) -> dict[str, torch.Tensor]:
    return gradients(model_of(CONFIGS[name], NONE))


@pytest.mark.parametrize(("kind", "interval"), KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_same_bits(name: str, kind: ActivationCheckpointing, interval: int) -> None:
    expected, found = kept_gradients(name), gradients(model_of(CONFIGS[name], kind, interval))
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert torch.equal(gradient, expected[key]), key
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


def kept_bytes(model: GPTNeoXForCausalLM) -> int:
    """What a forward pass keeps for the backward pass, besides parameters."""
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.gpt_neox(IDS)
        total = sum(kept.values())
    del output
    return total


def test_less_is_kept() -> None:
    """Full: of each block its input alone; selective: all but attention's insides; every second block: half of it."""
    config = CONFIGS["plain"]
    none, full, second, selective = (
        kept_bytes(model_of(config, kind, interval))
        for kind, interval in [(NONE, 1), (FULL, 1), (FULL, 2), (SELECTIVE, 1)]
    )
    states = IDS.numel() * config.hidden_size * 4
    assert LAYERS * states <= full < (LAYERS + 3) * states
    assert full < selective < none
    assert second - full == pytest.approx((none - full) / 2, rel=0.1)


class Calls:
    """Counts the passes through every block's two levels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks: Counter[int] = Counter()
        self.attentions: Counter[int] = Counter()
        compute, attend = Block.compute, Attention.attend

        def counted_compute(block: Block, *arguments: Any, **named: Any) -> torch.Tensor:
            self.blocks[block.index] += 1
            return compute(block, *arguments, **named)

        def counted_attend(attention: Attention, *arguments: Any, **named: Any) -> torch.Tensor:
            self.attentions[id(attention)] += 1
            return attend(attention, *arguments, **named)

        monkeypatch.setattr(Block, "compute", counted_compute)
        monkeypatch.setattr(Attention, "attend", counted_attend)


@pytest.mark.parametrize(
    ("kind", "interval", "blocks", "attentions"),
    [
        (NONE, 1, [1, 1, 1, 1], [1, 1, 1, 1]),
        (FULL, 1, [2, 2, 2, 2], [2, 2, 2, 2]),
        (FULL, 2, [2, 1, 2, 1], [2, 1, 2, 1]),
        (FULL, 3, [2, 1, 1, 2], [2, 1, 1, 2]),
        (SELECTIVE, 1, [1, 1, 1, 1], [2, 2, 2, 2]),
        (SELECTIVE, 2, [1, 1, 1, 1], [2, 2, 2, 2]),  # the interval is of full checkpointing
    ],
)
def test_what_is_computed_again(
    monkeypatch: pytest.MonkeyPatch,
    kind: ActivationCheckpointing,
    interval: int,
    blocks: list[int],
    attentions: list[int],
) -> None:
    calls, model = Calls(monkeypatch), model_of(CONFIGS["dropout"], kind, interval)
    model(IDS).sum().backward()
    assert [calls.blocks[index] for index in range(LAYERS)] == blocks
    assert [calls.attentions[id(layer.attention)] for layer in model.gpt_neox.layers] == attentions


@pytest.mark.parametrize(("kind", "interval"), KINDS)
def test_without_gradients_nothing_is_recomputed(
    monkeypatch: pytest.MonkeyPatch, kind: ActivationCheckpointing, interval: int
) -> None:
    calls, model = Calls(monkeypatch), model_of(CONFIGS["plain"], kind, interval).eval()
    with torch.no_grad():
        found = model(IDS)
    assert torch.equal(found, model_of(CONFIGS["plain"], NONE)(IDS))
    assert set(calls.blocks.values()) == {2}  # once for each of the two models
    assert not found.requires_grad
