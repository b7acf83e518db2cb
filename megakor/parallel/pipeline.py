"""The model as DeepSpeed pipeline layers, and the canonical name of every parameter of a stage.

Only hidden states cross a stage boundary. The layers are the embedding, the blocks, the final norm and the output
projection; tied embeddings are one tied layer that stands at both ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn
from torch.nn import functional

from megakor.config.schema import ModelConfig
from megakor.model import parameters
from megakor.model.gpt_neox import Block
from megakor.model.layers import Embedding, Linear, Linears
from megakor.parallel.dims import ParallelDims

TIED = "embed"


def project_tied(embedding: nn.Embedding, hidden_states: torch.Tensor) -> torch.Tensor:
    """Logits from the embedding's own rows."""
    return functional.linear(hidden_states, embedding.weight)


def layer_specs(config: ModelConfig, linears: Linears) -> list[tuple[str, LayerSpec]]:
    """Every pipeline layer with its canonical prefix, first to last."""
    assert config.vocab_size is not None
    size = (config.vocab_size, config.hidden_size)
    if config.tie_word_embeddings:
        first = TiedLayerSpec(TIED, Embedding, *size)
        last = TiedLayerSpec(TIED, Embedding, *size, forward_fn=project_tied)
    else:
        first = LayerSpec(Embedding, *size)
        last = LayerSpec(Linear, config.hidden_size, config.vocab_size, bias=False)
    blocks = [(parameters.block(index), LayerSpec(Block, config, linears)) for index in range(config.num_hidden_layers)]
    norm = LayerSpec(nn.LayerNorm, config.hidden_size, eps=config.layer_norm_eps)
    return [(parameters.EMBEDDING, first), *blocks, (parameters.FINAL_NORM, norm), (parameters.HEAD, last)]


class GPTNeoXPipeline(PipelineModule):
    """This rank's stage. Every rank of the run constructs it, with the process group initialised.

    Args:
        loss_fn: called on the last stage as `loss_fn(logits, labels)`.
        partition: how layers go to stages: `parameters`, `uniform` or `type:REGEX`.
    """

    def __init__(
        self, config: ModelConfig, linears: Linears, dims: ParallelDims, partition: str, loss_fn: Callable
    ) -> None:
        layers = layer_specs(config, linears)
        self.prefixes = [prefix for prefix, _ in layers]
        super().__init__(
            layers=[spec for _, spec in layers],
            topology=PipeModelDataParallelTopology(num_pp=dims.pipeline, num_dp=dims.data, num_mp=dims.tensor),
            loss_fn=loss_fn,
            partition_method=partition,
            activation_checkpoint_interval=0,
        )

    def canonical_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The stage's parameters by canonical name."""
        for name, parameter in self.named_parameters():
            layer, _, rest = name.partition(".")
            if layer == "tied_modules":
                yield f"{parameters.EMBEDDING}.{rest.partition('.')[2]}", parameter
            else:
                yield f"{self.prefixes[int(layer)]}.{rest}", parameter
