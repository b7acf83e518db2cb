"""Initial values of a model's parameters: a function of the seed and the canonical name alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from megakor.config.schema import ModelConfig
from megakor.model.specs import ParameterSpec, parameter_specs


def initial_value(spec: ParameterSpec, seed: int) -> torch.Tensor:
    """The whole initial tensor, fp32 on the CPU."""
    if spec.std is None and spec.bound is None:
        return torch.full(spec.shape, spec.constant, dtype=torch.float32)
    digest = hashlib.sha256(f"{seed}:{spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if spec.bound is not None:
        return torch.empty(spec.shape, dtype=torch.float32).uniform_(-spec.bound, spec.bound, generator=generator)
    assert spec.std is not None
    return torch.randn(spec.shape, generator=generator, dtype=torch.float32).mul_(spec.std)


@torch.no_grad()
def initialize_parameters(named: Iterable[tuple[str, nn.Parameter]], config: ModelConfig, seed: int) -> None:
    """Fill parameters, given with their canonical names, with their initial values."""
    specs = {spec.name: spec for spec in parameter_specs(config)}
    for name, parameter in named:
        parameter.copy_(initial_value(specs[name], seed))
