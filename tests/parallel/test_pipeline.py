"""The stages of a pipeline hold every parameter once, by its canonical name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megakor.config.schema import ModelConfig
from megakor.model.gpt_neox import GPTNeoXForCausalLM, Parts
from megakor.model.parameters import initial_value
from megakor.model.specs import parameter_specs
from megakor.parallel.dims import ParallelDims
from megakor.parallel.pipeline import GPTNeoXPipeline, layer_specs
from tests.model.configs import small
from tests.ranks import run_ranks


@pytest.mark.parametrize("tied", [False, True])
def test_the_layers_in_a_row_are_the_model(tied: bool) -> None:
    config = small(tie_word_embeddings=tied)
    model = GPTNeoXForCausalLM(config)
    with torch.no_grad():
        for spec in parameter_specs(config):
            model.get_parameter(spec.name).copy_(initial_value(spec, 0))
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    states: torch.Tensor = ids
    embedding: nn.Module | None = None
    with torch.no_grad():
        for prefix, spec in layer_specs(config, Parts()):
            layer = spec.build()
            if tied and prefix == "embed_out":
                assert embedding is not None
                states = spec.forward_fn(embedding, states)
                continue
            for name, parameter in layer.named_parameters():
                parameter.copy_(model.get_parameter(f"{prefix}.{name}"))
            embedding = embedding or layer
            states = layer(states)
        torch.testing.assert_close(states, model(ids), rtol=0, atol=0)


def names(config: ModelConfig, stages: int, partition: str) -> dict[str, tuple[int, ...]]:
    dims = ParallelDims(pipeline=stages, data=2 // stages, context=1, tensor=1)
    stage = GPTNeoXPipeline(config, Parts(), dims, partition, loss_fn=lambda logits, labels: logits.sum())
    return {name: tuple(parameter.shape) for name, parameter in stage.canonical_parameters()}


def all_names(cases: list[tuple[ModelConfig, str]]) -> list[dict[str, tuple[int, ...]]]:
    return [names(config, 2, partition) for config, partition in cases]


def test_two_stages_hold_everything_once() -> None:
    cases = [
        (small(tie_word_embeddings=tied), partition)
        for tied in (False, True)
        for partition in ("parameters", "uniform", "type:Block")
    ]
    first, second = run_ranks(all_names, 2, cases)
    for (config, partition), front, back in zip(cases, first, second, strict=True):
        whole = {spec.name: spec.shape for spec in parameter_specs(config)}
        assert front | back == whole, partition
        shared = {"gpt_neox.embed_in.weight"} if config.tie_word_embeddings else set()
        assert front.keys() & back.keys() == shared, partition
        assert "gpt_neox.embed_in.weight" in front
        assert "gpt_neox.final_layer_norm.weight" in back
        assert any("layers" in name for name in front)
        assert any("layers" in name for name in back)
