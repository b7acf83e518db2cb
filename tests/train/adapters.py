"""Tiny models with adapters in training: engines of any layout, and the same by plain torch with PEFT's layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megakor.checkpoint.format import WEIGHT
from megakor.config.schema import LoraConfig, LoraTarget, PretrainConfig
from megakor.model.gpt_neox import GPTNeoXForCausalLM
from megakor.model.lora import adapter_specs
from megakor.model.parameters import initialize_parameters
from megakor.model.specs import WHOLE, Shard
from megakor.parallel.dims import ParallelDims
from megakor.train.engine import Engine, StepResult
from megakor.train.values import SeededValues
from tests.parallel.shards import value
from tests.train.engines import LR, NUM_TOKENS, model_of, plain_steps

EVERYWHERE = LoraConfig(rank=3, alpha=6.0, targets=list(LoraTarget))


@dataclass
class Begun(SeededValues):
    """The seed's values, but for B, which is not zero: A has gradients from the first step on."""

    def fill(self, out: torch.Tensor, state: str, name: str, start: int, shard: Shard = WHOLE) -> None:
        assert self.lora is not None
        shapes = {spec.name: spec.shape for spec in adapter_specs(self.model, self.lora)}
        if state == WEIGHT and name.endswith("lora_B.weight"):
            out.copy_(shard.of(begun(name, shapes[name])).flatten()[start : start + out.numel()])
        else:
            super().fill(out, state, name, start, shard)


def begun(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return 0.1 * value(name, *shape)


def make_adapted(config: PretrainConfig, lora: LoraConfig = EVERYWHERE) -> Engine:
    """Every rank of the process group calls."""
    dims, model = ParallelDims.from_config(config.parallel, dist.get_world_size()), model_of(config)
    return Engine(config, model, NUM_TOKENS, dims, Begun(model, config.train.seed, lora), lora)


def by_peft(
    config: PretrainConfig, num_steps: int, lora: LoraConfig = EVERYWHERE
) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
    """The same steps on a whole model with PEFT's layers, torch's clipping and AdamW; results, and adapters after."""
    import peft

    model: Any = GPTNeoXForCausalLM(model_of(config))
    initialize_parameters(model.named_parameters(), model_of(config), config.train.seed)
    targets = [target.value for target in lora.targets]
    peft.inject_adapter_in_model(peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets), model)
    seeded = Begun(model_of(config), config.train.seed, lora)
    adapters = {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert adapters.keys() == {spec.name for spec in adapter_specs(model_of(config), lora)}
    with torch.no_grad():
        for name, parameter in adapters.items():
            seeded.fill(parameter.view(-1), WEIGHT, name, 0)
    optimizer = torch.optim.AdamW(
        adapters.values(), lr=LR, betas=(config.optimizer.beta1, config.optimizer.beta2), eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
    )  # fmt: skip
    return plain_steps(model, optimizer, num_steps), {name: parameter.detach() for name, parameter in adapters.items()}
