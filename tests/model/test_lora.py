"""Adapters of a whole model against PEFT's: names, shapes, initial values, outputs and gradients."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import peft
import pytest
import torch

from megakor.config.schema import LoraConfig, LoraTarget
from megakor.model.flops import train_flops_per_token
from megakor.model.gpt_neox import GPTNeoXForCausalLM
from megakor.model.layers import WholeLayers
from megakor.model.lora import adapt, adapter_specs, adapters_of, is_adapter, num_adapter_parameters
from megakor.model.parameters import initial_value, initialize_parameters
from megakor.model.specs import parameter_specs
from tests.model.configs import small
from tests.parallel.shards import value

CHOICES = [[LoraTarget.query_key_value], [LoraTarget.dense], list(LoraTarget)]


def of_peft(lora: LoraConfig) -> Any:
    model: Any = GPTNeoXForCausalLM(small())
    targets = [target.value for target in lora.targets]
    return peft.inject_adapter_in_model(
        peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets), model
    )


def of_ours(lora: LoraConfig) -> GPTNeoXForCausalLM:
    model = GPTNeoXForCausalLM(small())
    adapt(model, lora, WholeLayers())
    return model


def plain_name(name: str) -> str:
    """PEFT's name without what it puts in between."""
    return name.replace(".base_layer", "").replace(".default", "")


@pytest.mark.parametrize("targets", CHOICES)
def test_parameters_are_peft_s(targets: list[LoraTarget]) -> None:
    lora = LoraConfig(rank=5, targets=targets)
    theirs = {plain_name(name): (p.shape, p.requires_grad) for name, p in of_peft(lora).named_parameters()}
    ours = {name: (p.shape, p.requires_grad) for name, p in of_ours(lora).named_parameters()}
    assert ours == theirs
    specs = adapter_specs(small(), lora)
    assert {name for name, (_, trained) in ours.items() if trained} == {spec.name for spec in specs}
    assert all(spec.shape == ours[spec.name][0] for spec in specs)
    assert all(is_adapter(spec.name) for spec in specs)
    assert not any(is_adapter(spec.name) for spec in parameter_specs(small()))
    assert num_adapter_parameters(small(), lora) == sum(math.prod(spec.shape) for spec in specs)


def test_shards_follow_those_of_the_linear() -> None:
    dims = {spec.name: spec.shard_dim for spec in parameter_specs(small())}
    found = {spec.name: spec.shard_dim for spec in adapter_specs(small(), LoraConfig(rank=2, targets=list(LoraTarget)))}
    for name, dim in dims.items():
        down, up = adapters_of(name)
        if up in found:
            assert (found[down], found[up]) == ((1, None) if dim == 1 else (None, 0)), name


def test_initial_values_are_of_peft_s_distribution() -> None:
    """A alone is random: uniform, within the same bound. The values depend on seed and name, as all do."""
    config, lora = small(hidden_size=96, vocab_size=64), LoraConfig(rank=64)
    model: Any = GPTNeoXForCausalLM(config)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=64, target_modules=["query_key_value"]), model)
    specs, bound = adapter_specs(config, lora), 96**-0.5
    parameters = {plain_name(name): parameter for name, parameter in theirs.named_parameters()}
    seen = set()
    for spec in specs:
        ours, expected = initial_value(spec, 3), parameters[spec.name]
        if spec.name.endswith("lora_B.weight"):
            assert not ours.any()
            assert not expected.any()
            continue
        assert 0.99 * bound < ours.abs().max() <= bound
        assert 0.99 * bound < expected.abs().max() <= bound
        assert (
            ours.std().item() == pytest.approx(expected.std().item(), rel=0.03) == pytest.approx(bound / 3**0.5, 0.03)
        )
        assert torch.equal(ours, initial_value(spec, 3))
        seen |= {ours[0, 0].item(), initial_value(spec, 4)[0, 0].item()}
    assert len(seen) == len(specs)


def test_a_fresh_adapter_changes_nothing() -> None:
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    plain, ours = GPTNeoXForCausalLM(small()), of_ours(LoraConfig(rank=4, targets=list(LoraTarget)))
    initialize_parameters(plain.named_parameters(), small(), 1)
    specs = {spec.name: spec for spec in adapter_specs(small(), LoraConfig(rank=4, targets=list(LoraTarget)))}
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(initial_value(specs[name], 1) if name in specs else plain.get_parameter(name))
    assert torch.equal(plain(ids), ours(ids))


@pytest.mark.parametrize("targets", CHOICES)
def test_outputs_and_gradients_are_peft_s(targets: list[LoraTarget]) -> None:
    lora = LoraConfig(rank=5, alpha=7.5, targets=targets)
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    found = []
    for model in (of_ours(lora), of_peft(lora)):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(0.2 * value(plain_name(name), *parameter.shape))
        logits = model(ids)
        (logits * value("direction", *logits.shape)).sum().backward()
        gradients = {plain_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((logits.detach(), gradients))
    (logits, gradients), (expected_logits, expected) = found
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-4)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert (gradient - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


def test_flops_of_a_token() -> None:
    """By hand: forward, and backward to the states, of every weight; gradients of the adapters alone."""
    config, lora = small(), LoraConfig(rank=2)
    weights = sum(math.prod(spec.shape) for spec in parameter_specs(config)) - 64 * 48
    adapters = 3 * 2 * (48 + 144)
    attention = 12 * 3 * 48 * 32
    assert train_flops_per_token(config, 32, lora) == 4 * weights + 6 * adapters + attention
    assert train_flops_per_token(config, 32) == 6 * weights + attention


def test_counting_needs_no_torch() -> None:
    code = "import sys, megakor.model.lora, megakor.model.flops; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
