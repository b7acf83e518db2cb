"""The partition against DeepSpeed's own, on the models that are shipped and on weights at random."""

from __future__ import annotations

import itertools
import random

import pytest
from deepspeed.runtime.utils import partition_balanced, partition_uniform

from megakor.config.schema import ModelConfig
from megakor.model.specs import num_parameters
from megakor.plan.partition import balanced, layers_of, partition, uniform, words
from tests.config.commands import quickly_composed

MODELS = ["1_3b", "3_8b", "5_8b", "12_8b"]


@pytest.mark.parametrize("seed", range(4))
def test_balanced_is_deepspeeds(seed: int) -> None:
    """Ties included, of which weights with few values have many."""
    rng = random.Random(seed)
    for _ in range(50):
        size = rng.randint(4, 30)
        weights = tuple(rng.choice([0, 1, 1, 5, 100, 1000, 1000]) for _ in range(size))
        num_stages = rng.randint(1, size - 1)
        assert list(balanced(weights, num_stages)) == list(partition_balanced(weights, num_stages))
        assert list(uniform(size, num_stages)) == list(partition_uniform(size, num_stages))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tensor", [1, 4])
def test_shipped_models_are_cut_as_deepspeed_cuts_them(name: str, tensor: int) -> None:
    model = quickly_composed("plan", f"model={name}").model
    layers = layers_of(model)
    sizes = [layer.numel(tensor) for layer in layers]
    for num_stages in (2, 3, 4, 7, 8, 16):
        borders = partition_balanced(sizes, num_stages)
        stages = partition(layers, "parameters", num_stages, tensor)
        assert [len(stage.layers) for stage in stages] == [stop - start for start, stop in itertools.pairwise(borders)]
        assert sum(stage.parameters for stage in stages) == sum(sizes)


def tiny(**changes: object) -> ModelConfig:
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    return ModelConfig(**{**sizes, "vocab_size": 128, **changes})


def test_layers_hold_the_model_once() -> None:
    for model in (tiny(), tiny(attention_bias=False)):
        assert sum(layer.numel(1) for layer in layers_of(model)) == num_parameters(model)
    tied = layers_of(tiny(tie_word_embeddings=True))
    assert sum(layer.numel(1) for layer in tied) == num_parameters(tiny(tie_word_embeddings=True)) + 128 * 64


def test_by_type() -> None:
    stages = partition(layers_of(tiny()), "type:BLOCK", 2, 1)
    assert [stage.holds for stage in stages] == [
        "embedding, blocks 0 to 1", "blocks 2 to 3, final norm, output",
    ]  # fmt: skip
    with pytest.raises(
        ValueError, match="pipeline_partition=type:mixer must match one of .*: Embedding, Block, Norm, Linear"
    ):
        partition(layers_of(tiny()), "type:Mixer", 2, 1)


def test_words() -> None:
    assert words({"gpt_neox.layers.3"}) == "block 3"
    assert words({"embed_out", "gpt_neox.final_layer_norm"}) == "final norm, output"
    assert words({"gpt_neox.embed_in"}) == "embedding"
