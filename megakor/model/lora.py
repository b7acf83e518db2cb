"""LoRA (Hu et al. 2021): adapters of rank r beside frozen linears, y = W x + alpha / r · B A x.

    a model ─► `adapt`: its parameters stay, and targeted linears get `lora_A` and `lora_B`, which are trained

Names are PEFT's without its prefix: `gpt_neox.layers.3.attention.query_key_value.lora_A.weight`, A is [rank, in] and
B [out, rank]. Which linears have adapters is said here alone; `Linear` adds them, and the factory of layers makes them.
What only counts need not load PyTorch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megakor.config.schema import LoraConfig, ModelConfig
from megakor.model.specs import ParameterSpec, parameter_specs

if TYPE_CHECKING:
    from torch import nn

    from megakor.model.layers import Layers

DOWN, UP = "lora_A.weight", "lora_B.weight"


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's, by its canonical name."""
    return name.endswith((f".{DOWN}", f".{UP}"))


def adapters_of(name: str) -> tuple[str, str]:
    """The names of the A and the B that a weight would have beside it."""
    prefix = name.removesuffix("weight")
    return prefix + DOWN, prefix + UP


def adapter_specs(model: ModelConfig, lora: LoraConfig) -> list[ParameterSpec]:
    """Every parameter of the adapters.

    A starts as in PEFT, uniform within 1 / sqrt(in), which is Kaiming's bound for a slope of sqrt(5); B starts at zero.
    Of a linear that tensor ranks cut by its outputs, B is cut; by its inputs, A.
    """
    specs = []
    targets = tuple(f".{target.value}.weight" for target in lora.targets)
    for spec in parameter_specs(model):
        if spec.name.endswith(targets):
            (out, width), (down, up) = spec.shape, adapters_of(spec.name)
            by_inputs = spec.shard_dim == 1
            specs.append(ParameterSpec(down, (lora.rank, width), 1 if by_inputs else None, bound=1 / math.sqrt(width)))
            specs.append(ParameterSpec(up, (out, lora.rank), None if by_inputs else 0))
    return specs


def num_adapter_parameters(model: ModelConfig, lora: LoraConfig) -> int:
    """Parameters of all adapters."""
    return sum(math.prod(spec.shape) for spec in adapter_specs(model, lora))


def adapt(module: nn.Module, lora: LoraConfig, layers: Layers) -> None:
    """Freeze a model, or a stage of one, and give its targeted linears adapters; values are not filled in."""
    module.requires_grad_(False)
    targets = {target.value for target in lora.targets}
    for name, layer in list(module.named_modules()):
        if name.rpartition(".")[2] in targets:
            layer.lora_A, layer.lora_B = layers.adapters(layer, lora.rank)
            layer.lora_scale = lora.alpha / lora.rank
