"""Which layers a pipeline stage holds: the layers' sizes go in, DeepSpeed's own partition comes out, without DeepSpeed.

The layers are those of `megakor.parallel.pipeline`: the embedding, the blocks, the final norm, the output projection.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megakor.config.schema import ModelConfig
from megakor.model.specs import EMBEDDING, FINAL_NORM, HEAD, ParameterSpec, block, parameter_specs


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
        return sum(math.prod(spec.shard(0, tensor).shape(spec.shape)) for spec in self.parameters)


def layers_of(model: ModelConfig) -> list[Layer]:
    """Every pipeline layer, first to last."""
    found: dict[str, list[ParameterSpec]] = {}
    for spec in parameter_specs(model):
        inside = re.match(r"gpt_neox\.layers\.\d+", spec.name)
        found.setdefault(inside[0] if inside else spec.name.rpartition(".")[0], []).append(spec)
    last = EMBEDDING if model.tie_word_embeddings else HEAD
    blocks = [Layer(block(index), "Block", index, tuple(found[block(index)])) for index in range(model.num_hidden_layers)]
    return [
        Layer(EMBEDDING, "Embedding", None, tuple(found[EMBEDDING])),
        *blocks,
        Layer(FINAL_NORM, "Norm", None, tuple(found[FINAL_NORM])),
        Layer(HEAD, "Embedding" if model.tie_word_embeddings else "Linear", None, tuple(found[last])),
    ]


def partition(layers: Sequence[Layer], method: str, num_stages: int, tensor: int) -> list[Sequence[Layer]]:
    """The layers of each stage, as `deepspeed.PipelineModule` cuts them.

    Args:
        method: parameters, uniform or type:REGEX.
        tensor: ranks that split each layer: DeepSpeed counts what one of them holds.

    Raises:
        ValueError: the expression matches no layer.
    """
    method = method.lower()  # as DeepSpeed does
    if num_stages == 1:
        return [layers]
    if method == "uniform":
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
    return [layers[start:stop] for start, stop in zip(borders, borders[1:], strict=False)]


def uniform(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Borders of stages that hold as many layers each, one more the first ones where they do not come out even."""
    each, more = divmod(num_layers, num_stages)
    return tuple(stage * each + min(stage, more) for stage in range(num_stages + 1))


@lru_cache(maxsize=256)
def balanced(weights: tuple[int, ...], num_stages: int) -> tuple[int, ...]:
    """Borders of stages of even weight: `deepspeed.runtime.utils.partition_balanced`, which must be followed to the tie.

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
