from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakor.config.schema import ModelConfig
from megakor.model.flops import train_flops_per_token
from megakor.model.gpt_neox import GPTNeoXForCausalLM
from megakor.model.parameters import initial_value, initialize_parameters
from megakor.model.specs import num_parameters, parameter_specs
from tests.config.commands import PRETRAIN, quickly_composed
from tests.model.configs import small

COUNTS = {"1_3b": 1_331_810_304, "3_8b": 3_809_974_272, "5_8b": 5_885_059_072, "12_8b": 12_893_603_840}
"""The house plan's, at 30,080 rows."""


def on_meta(config: ModelConfig) -> GPTNeoXForCausalLM:
    with torch.device("meta"):
        return GPTNeoXForCausalLM(config)


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_counts_of_the_shipped_sizes(name: str, count: int) -> None:
    config = quickly_composed("pretrain", *PRETRAIN, f"model={name}").model
    assert config.vocab_size == 30_080
    assert not config.tie_word_embeddings
    assert sum(parameter.numel() for parameter in on_meta(config).parameters()) == count
    assert sum(math.prod(spec.shape) for spec in parameter_specs(config)) == count
    assert num_parameters(config) == count


@settings(max_examples=30, deadline=None)
@given(
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([4, 8]),
    layers=st.integers(1, 3),
    inner=st.integers(1, 40),
    rows=st.integers(1, 50),
    tied=st.booleans(),
    bias=st.booleans(),
    parallel=st.booleans(),
)
def test_the_table_is_the_model(
    heads: int, head_dim: int, layers: int, inner: int, rows: int, tied: bool, bias: bool, parallel: bool
) -> None:
    config = small(
        hidden_size=heads * head_dim, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=inner,
        vocab_size=rows, tie_word_embeddings=tied, attention_bias=bias, use_parallel_residual=parallel,
    )  # fmt: skip
    built = {name: tuple(parameter.shape) for name, parameter in on_meta(config).named_parameters()}
    specs = parameter_specs(config)
    assert {spec.name: spec.shape for spec in specs} == built
    assert len(specs) == len(built)


def test_what_decays_and_what_splits() -> None:
    for spec in parameter_specs(small()):
        is_matrix = spec.name.endswith("weight") and "norm" not in spec.name
        assert spec.decays is is_matrix, spec.name
        if spec.shard_dim is not None:
            row = spec.name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
            assert spec.shard_dim == (1 if row else 0), spec.name
        else:
            assert "norm" in spec.name or spec.name.endswith(("attention.dense.bias", "dense_4h_to_h.bias"))


def test_initial_values_depend_on_seed_and_name_only() -> None:
    config = small()
    specs = {spec.name: spec for spec in parameter_specs(config)}
    torch.manual_seed(1)
    first = {name: initial_value(spec, 7) for name, spec in specs.items()}
    torch.manual_seed(2)
    state = torch.get_rng_state()
    for name in reversed(specs):
        assert torch.equal(first[name], initial_value(specs[name], 7)), name
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    other = {
        spec.name: initial_value(spec, 7) for spec in parameter_specs(small(tie_word_embeddings=True, vocab_size=64))
    }
    for name, value in other.items():
        assert torch.equal(value, first[name]), name
    assert set(first) - set(other) == {"embed_out.weight"}


def test_initial_values_differ_between_names_and_seeds() -> None:
    specs = [spec for spec in parameter_specs(small()) if spec.std is not None]
    starts = {tuple(initial_value(spec, seed).view(-1)[:4].tolist()) for spec in specs for seed in (0, 1, 2**40)}
    assert len(starts) == 3 * len(specs)


def test_initial_values_are_fixed_forever() -> None:
    """Golden: a change of these changes every run that has only a seed."""
    spec = next(spec for spec in parameter_specs(small()) if spec.name == "gpt_neox.embed_in.weight")
    golden = torch.tensor([-0.0056339214, -0.0044669877, -0.011526252, 0.028709017])
    torch.testing.assert_close(initial_value(spec, 1234).view(-1)[:4], golden, rtol=1e-5, atol=0)


def test_initial_values_are_of_their_distribution() -> None:
    config = small(hidden_size=96, intermediate_size=384, vocab_size=512, num_hidden_layers=2, initializer_range=0.05)
    for spec in parameter_specs(config):
        value = initial_value(spec, 3)
        assert value.shape == spec.shape
        assert value.dtype == torch.float32
        if not spec.decays:
            assert torch.equal(value, torch.full(spec.shape, float("norm" in spec.name and "weight" in spec.name)))
            continue
        residual = spec.name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
        expected = 0.05 / (2.0 if residual else 1.0)  # 1/sqrt(2 × 2 layers)
        assert value.std().item() == pytest.approx(expected, rel=0.03), spec.name
        assert abs(value.mean().item()) < 0.05 * expected, spec.name


def test_initialize_fills_every_parameter() -> None:
    config = small()
    model = GPTNeoXForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialize_parameters(model.named_parameters(), config, seed=5)
    for spec in parameter_specs(config):
        assert torch.equal(model.get_parameter(spec.name), initial_value(spec, 5))


def test_flops_of_a_token() -> None:
    """PaLM's formula by hand: 6 × (every parameter but the input embedding) + 12 × layers × hidden × sequence."""
    config = small()
    block = 4 * 48 + (48 * 144 + 144) + (48 * 48 + 48) + (48 * 96 + 96) + (96 * 48 + 48)
    untied = 3 * block + 2 * 48 + 64 * 48
    assert train_flops_per_token(config, 32) == 6 * untied + 12 * 3 * 48 * 32
    assert train_flops_per_token(small(tie_word_embeddings=True), 32) == 6 * untied + 12 * 3 * 48 * 32
