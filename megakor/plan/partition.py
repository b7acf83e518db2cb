"""Which layers a pipeline stage holds: the layers' sizes go in, DeepSpeed's own partition comes out, without DeepSpeed.

The layers are those of `megakor.parallel.pipeline`: the embedding, the blocks, the final norm, the output projection.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megakor.config.schema import ModelConfig
from megakor.model.specs import EMBEDDING, FINAL_NORM, HEAD, ParameterSpec, block, parameter_specs
from megakor.plan.work import StageLayers


@dataclass(frozen=True)
class Layer:
    """A pipeline layer.

    Attributes:
        prefix: of its parameters' canonical names.
        kind: name of its class, by which `type:REGEX` finds it.
        index: of a block; None for the others.
        parameters: its parameters; a tied output projection has the embedding's.
    """

    prefix: str
    kind: str
    index: int | None
    parameters: tuple[ParameterSpec, ...]

    def numel(self, tensor: int) -> int:
        """Elements that a tensor rank holds."""
        return sum(spec.shard_numel(tensor) for spec in self.parameters)


def layers_of(model: ModelConfig) -> list[Layer]:
    """Every pipeline layer, first to last."""
    found: dict[str, list[ParameterSpec]] = {}
    for spec in parameter_specs(model):
        found.setdefault(prefix_of(spec.name), []).append(spec)
    last = EMBEDDING if model.tie_word_embeddings else HEAD
    blocks = [
        Layer(block(index), "Block", index, tuple(found[block(index)])) for index in range(model.num_hidden_layers)
    ]
    return [
        Layer(EMBEDDING, "Embedding", None, tuple(found[EMBEDDING])),
        *blocks,
        Layer(FINAL_NORM, "Norm", None, tuple(found[FINAL_NORM])),
        Layer(HEAD, "Embedding" if model.tie_word_embeddings else "Linear", None, tuple(found[last])),
    ]


@dataclass(frozen=True)
class Stage:
    """A pipeline stage.

    Attributes:
        number: of the stage, from 0.
        layers: that it holds.
        parameters: that one of its ranks holds, a tied one once.
        largest: of them, those of the largest tensor.
    """

    number: int
    layers: tuple[Layer, ...]
    parameters: int
    largest: int

    @classmethod
    def of(cls, number: int, layers: Sequence[Layer], tensor: int) -> Stage:
        sizes = {spec.name: spec.shard_numel(tensor) for layer in layers for spec in layer.parameters}
        return cls(number, tuple(layers), sum(sizes.values()), max(sizes.values()))

    @property
    def held(self) -> StageLayers:
        """What it holds, for the time of its passes."""
        blocks = [layer.index for layer in self.layers if layer.index is not None]
        prefixes = {layer.prefix for layer in self.layers}
        span = range(blocks[0], blocks[-1] + 1) if blocks else range(0)
        return StageLayers(span, embeds=EMBEDDING in prefixes, projects=HEAD in prefixes)

    @property
    def holds(self) -> str:
        """The same in words."""
        return words({layer.prefix for layer in self.layers})


def partition(layers: Sequence[Layer], method: str, num_stages: int, tensor: int) -> list[Stage]:
    """The stages into which `deepspeed.PipelineModule` cuts the layers.

    Args:
        method: parameters, uniform or type:REGEX.
        tensor: ranks that split each layer: DeepSpeed counts what one of them holds.

    Raises:
        ValueError: the expression matches no layer.
    """
    method = method.lower()  # as DeepSpeed does
    if num_stages == 1:
        borders: tuple[int, ...] = (0, len(layers))
    elif method == "uniform":
        borders = uniform(len(layers), num_stages)
    elif method == "parameters":
        borders = balanced(tuple(layer.numel(tensor) for layer in layers), num_stages)
    else:
        expression = method.split(":")[1]
        weights = tuple(int(bool(re.search(expression, layer.kind, re.IGNORECASE))) for layer in layers)
        if not any(weights):
            kinds = ", ".join(dict.fromkeys(layer.kind for layer in layers))
            raise ValueError(f"parallel.pipeline_partition={method} must match one of the kinds of layers: {kinds}")
        borders = balanced(weights, num_stages)
    cuts = enumerate(itertools.pairwise(borders))
    return [Stage.of(number, layers[start:stop], tensor) for number, (start, stop) in cuts]


def uniform(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Borders of stages that hold as many layers each, one more the first ones where they do not come out even."""
    each, more = divmod(num_layers, num_stages)
    return tuple(stage * each + min(stage, more) for stage in range(num_stages + 1))


@lru_cache(maxsize=256)
def balanced(weights: tuple[int, ...], num_stages: int) -> tuple[int, ...]:
    """Borders of stages of even weight, as `deepspeed.runtime.utils.partition_balanced` finds them, ties included.

    A table holds, for the first `count` layers on so many stages, the least difference between the heaviest and the
    lightest stage that building on the tables before gives; of equal ones the last cut is taken.
    """
    total = [0]
    for weight in weights:
        total.append(total[-1] + weight)
    size = len(weights)
    heaviest, lightest = [0.0] + size * [math.inf], (size + 1) * [math.inf]
    cuts: list[list[int]] = []
    for stage in range(1, num_stages + 1):
        heavier, lighter, least = ((size + 1) * [math.inf] for _ in range(3))
        chosen = (size + 1) * [0]
        for count in range(stage, size + 1):
            for before in range(count):
                own = total[count] - total[before]
                most, fewest = max(heaviest[before], own), min(lightest[before], own)
                if least[count] >= most - fewest:
                    heavier[count], lighter[count], least[count] = most, fewest, most - fewest
                    chosen[count] = before
        heaviest, lightest = heavier, lighter
        cuts.append(chosen)
    borders = [size]
    for chosen in reversed(cuts):
        borders.append(chosen[borders[-1]])
    return tuple(reversed(borders))


def words(prefixes: Collection[str]) -> str:
    """Layers in words, from their prefixes: `embedding, blocks 0 to 9`."""
    blocks = sorted(int(found[1]) for name in prefixes if (found := re.fullmatch(r"gpt_neox\.layers\.(\d+)", name)))
    span = f"block {blocks[0]}" if len(blocks) == 1 else f"blocks {blocks[0]} to {blocks[-1]}" if blocks else ""
    ends = {EMBEDDING: "embedding", "": span, FINAL_NORM: "final norm", HEAD: "output"}
    return ", ".join(text for prefix, text in ends.items() if prefix in prefixes or (text and text == span))


def prefix_of(name: str) -> str:
    """Prefix of the layer that a parameter belongs to, from its canonical name."""
    inside = re.match(r"gpt_neox\.layers\.\d+", name)
    return inside[0] if inside else name.rpartition(".")[0]
