"""The model as DeepSpeed pipeline layers, and the canonical name of every parameter of a stage.

Only hidden states cross a stage boundary. The layers are the embedding, the blocks, the final norm and the output
projection; tied embeddings are one tied layer that stands at both ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn

from megakor.config.schema import ModelConfig
from megakor.model import specs
from megakor.model.gpt_neox import Block, Parts
from megakor.model.layers import Embedding, Linear, Norm
from megakor.parallel.dims import ParallelDims
from megakor.parallel.groups import pipeline_topology

TIED = "embed"


class MadeLayer(LayerSpec):
    """A pipeline layer that a factory makes.

    Args:
        kind: what it is, for DeepSpeed's partition by type and its listing.
        make: makes it.
    """

    def __init__(self, kind: type[nn.Module], make: Callable[[], nn.Module]) -> None:
        super().__init__(kind)
        self.make = make

    def build(self, log: bool = False) -> nn.Module:
        return self.make()


class MadeTiedLayer(TiedLayerSpec):
    """The same for a layer that stands at several places."""

    def __init__(
        self, key: str, kind: type[nn.Module], make: Callable[[], nn.Module], forward_fn: Callable | None = None
    ) -> None:
        super().__init__(key, kind, forward_fn=forward_fn)
        self.make = make

    build = MadeLayer.build


def layer_specs(config: ModelConfig, parts: Parts) -> list[tuple[str, LayerSpec]]:
    """Every pipeline layer with its canonical prefix, first to last."""
    assert config.vocab_size is not None
    rows, hidden, layers = config.vocab_size, config.hidden_size, parts.layers
    embedding = partial(layers.embedding, rows, hidden)
    first: Any = MadeLayer(Embedding, embedding)
    last: Any = MadeLayer(Linear, partial(layers.column, hidden, rows, bias=False))
    if config.tie_word_embeddings:
        first = MadeTiedLayer(TIED, Embedding, embedding)
        last = MadeTiedLayer(TIED, Embedding, embedding, forward_fn=lambda layer, states: layer.project(states))
    blocks = [(specs.block(index), LayerSpec(Block, config, parts, index)) for index in range(config.num_hidden_layers)]
    norm = MadeLayer(Norm, partial(layers.norm, hidden, config.layer_norm_eps))
    return [(specs.EMBEDDING, first), *blocks, (specs.FINAL_NORM, norm), (specs.HEAD, last)]


class GPTNeoXPipeline(PipelineModule):
    """This rank's stage. Every rank of the run constructs it, with the process group initialised.

    Args:
        loss_fn: called on the last stage as `loss_fn(logits, labels)`.
        partition: how layers go to stages: `parameters`, `uniform` or `type:REGEX`.
    """

    def __init__(
        self, config: ModelConfig, parts: Parts, dims: ParallelDims, partition: str, loss_fn: Callable
    ) -> None:
        layers = layer_specs(config, parts)
        self.prefixes, self.next_micro_batch = [prefix for prefix, _ in layers], parts.next_micro_batch
        self.partition = partition
        super().__init__(
            layers=[spec for _, spec in layers],
            topology=pipeline_topology(dims),
            loss_fn=loss_fn,
            partition_method=partition,
            activation_checkpoint_interval=0,
        )

    def forward(self, forward_input: torch.Tensor) -> torch.Tensor:
        """The stage's layers over one micro-batch."""
        self.next_micro_batch()
        return super().forward(forward_input)

    def check_blocks(self) -> None:
        """ValueError, on all ranks alike, where a stage has no block: adapters are in blocks, and each stage trains."""
        blocks = [spec.typename is Block for spec in self._layer_specs]
        for stage, (start, stop) in enumerate(pairwise(self.parts)):
            if not any(blocks[start:stop]):
                raise ValueError(
                    f"parallel.pipeline_partition={self.partition} must give each stage a block, since adapters are in "
                    f"blocks; stage {stage} has none; nearest: type:Block"
                )

    def canonical_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The stage's parameters by canonical name."""
        for name, parameter in self.named_parameters():
            layer, _, rest = name.partition(".")
            if layer == "tied_modules":
                yield f"{specs.EMBEDDING}.{rest.partition('.')[2]}", parameter
            else:
                yield f"{self.prefixes[int(layer)]}.{rest}", parameter
