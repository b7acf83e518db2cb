"""Every parameter of a model by its canonical name: whole shape, how it is cut, weight decay, spread of initial values.

The names are Hugging Face's for GPT-NeoX. Initial values, optimizer groups, checkpoints, plans and exports go by this
table, never by the names an engine gives. No tensor is made here: what only counts need not load PyTorch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megakor.config.schema import ModelConfig

if TYPE_CHECKING:
    import torch

EMBEDDING = "gpt_neox.embed_in"
FINAL_NORM = "gpt_neox.final_layer_norm"
HEAD = "embed_out"


def block(index: int) -> str:
    """Canonical prefix of block `index`."""
    return f"gpt_neox.layers.{index}"


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` equal parts of a tensor along `dim`; of the whole, if `count` is 1."""

    dim: int = 0
    index: int = 0
    count: int = 1

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The part's shape."""
        return tuple(size // self.count if dim == self.dim else size for dim, size in enumerate(whole))

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The part, as a view."""
        return whole.chunk(self.count, self.dim)[self.index] if self.count > 1 else whole


WHOLE = Shard()


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter.

    Attributes:
        name: canonical name.
        shape: shape of the whole tensor.
        shard_dim: the dimension that tensor parallelism splits; None where every tensor rank holds the whole.
        std: standard deviation of the initial values; None where they are not normal.
        constant: initial value where `std` and `bound` are None.
        bound: the initial values are uniform between -bound and bound.
    """

    name: str
    shape: tuple[int, ...]
    shard_dim: int | None
    std: float | None = None
    constant: float = 0.0
    bound: float | None = None

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, not to biases and norms."""
        return len(self.shape) > 1

    def shard(self, index: int, count: int) -> Shard:
        """What tensor rank `index` of `count` holds of it."""
        return WHOLE if self.shard_dim is None or count == 1 else Shard(self.shard_dim, index, count)

    def shard_numel(self, count: int) -> int:
        """Elements that each of `count` tensor ranks holds."""
        return math.prod(self.shard(0, count).shape(self.shape))


def parameter_specs(config: ModelConfig) -> list[ParameterSpec]:
    """Every parameter of the model, each once (a tied embedding is listed as the input embedding only).

    Matrices start from a normal distribution of `initializer_range`; the two that write to the residual stream are
    scaled by 1/sqrt(2 × layers), as in GPT-2 (Radford et al. 2019, section 2.3) and Megatron-LM.
    """
    assert config.vocab_size is not None, "the vocabulary is resolved before parameters are listed"
    hidden, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
    residual_std = std / math.sqrt(2 * config.num_hidden_layers)

    def norm(prefix: str) -> list[ParameterSpec]:
        return [
            ParameterSpec(f"{prefix}.weight", (hidden,), None, constant=1.0),
            ParameterSpec(f"{prefix}.bias", (hidden,), None),
        ]

    specs = [ParameterSpec(f"{EMBEDDING}.weight", (config.vocab_size, hidden), 0, std)]
    for index in range(config.num_hidden_layers):
        prefix = block(index)
        specs += norm(f"{prefix}.input_layernorm")
        specs += norm(f"{prefix}.post_attention_layernorm")
        specs.append(ParameterSpec(f"{prefix}.attention.query_key_value.weight", (3 * hidden, hidden), 0, std))
        specs.append(ParameterSpec(f"{prefix}.attention.dense.weight", (hidden, hidden), 1, residual_std))
        if config.attention_bias:
            specs.append(ParameterSpec(f"{prefix}.attention.query_key_value.bias", (3 * hidden,), 0))
            specs.append(ParameterSpec(f"{prefix}.attention.dense.bias", (hidden,), None))
        specs.append(ParameterSpec(f"{prefix}.mlp.dense_h_to_4h.weight", (inner, hidden), 0, std))
        specs.append(ParameterSpec(f"{prefix}.mlp.dense_h_to_4h.bias", (inner,), 0))
        specs.append(ParameterSpec(f"{prefix}.mlp.dense_4h_to_h.weight", (hidden, inner), 1, residual_std))
        specs.append(ParameterSpec(f"{prefix}.mlp.dense_4h_to_h.bias", (hidden,), None))
    specs += norm(FINAL_NORM)
    if not config.tie_word_embeddings:
        specs.append(ParameterSpec(f"{HEAD}.weight", (config.vocab_size, hidden), 0, std))
    return specs


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the whole model, padded vocabulary rows included."""
    return sum(math.prod(spec.shape) for spec in parameter_specs(config))


def resolve_vocabulary(model: ModelConfig, num_tokens: int) -> ModelConfig:
    """The architecture with its number of embedding rows.

    Raises:
        ValueError: fewer rows than the tokenizer has tokens.
    """
    rows, multiple = model.vocab_size, model.make_vocab_size_divisible_by
    if rows is None:
        rows = math.ceil(num_tokens / multiple) * multiple
    if rows < num_tokens:
        raise ValueError(f"model.vocab_size={rows} must be at least the tokenizer's vocabulary, {num_tokens}")
    return dataclasses.replace(model, vocab_size=rows)
