"""The two sides of the training benchmark: megakor's engine, and `transformers` with plain PyTorch.

Both start from the same weights, take the same batches as numpy arrays, and make the same AdamW step on the same
gradient: mean loss over the global batch, norm clipped, biases and norms not decayed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from megakor.config.schema import EngineConfig, ModelConfig, OptimizerConfig, ParallelConfig, Precision, TrainConfig
from megakor.data.stream import Batch
from megakor.interop.huggingface import model_json
from megakor.model.parameters import initial_value
from megakor.model.specs import parameter_specs
from megakor.parallel.dims import ParallelDims
from megakor.train.engine import Engine
from megakor.train.values import SeededValues

LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Case:
    """One shape in one precision.

    Attributes:
        name: of the shape.
        model: the architecture, `vocab_size` resolved; every row is a real token, so that both sides do the same sums.
        train: batch sizes, sequence length, precision, clipping.
    """

    name: str
    model: ModelConfig
    train: TrainConfig

    @property
    def key(self) -> str:
        return f"{self.name}_{self.train.precision.value}"

    @property
    def vocabulary(self) -> int:
        assert self.model.vocab_size is not None, "a benchmark's vocabulary is given"
        return self.model.vocab_size

    @property
    def num_micro_batches(self) -> int:
        return self.train.global_batch_size // self.train.micro_batch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of a step."""
        return self.train.global_batch_size * self.train.sequence_length

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of a step; ids fall off like words do, so that there is something to learn."""
        size, generator = self.train, np.random.default_rng([self.train.seed, step])
        shape = (self.num_micro_batches, size.micro_batch_size, size.sequence_length + 1)
        tokens = (self.vocabulary * generator.random(shape) ** 4).astype(np.int64)
        mask = np.ones((size.micro_batch_size, size.sequence_length), dtype=np.float32)
        return [
            Batch(np.ascontiguousarray(micro[:, :-1]), np.ascontiguousarray(micro[:, 1:]), mask, self.num_tokens)
            for micro in tokens
        ]


class Trainer(Protocol):
    """One side: makes optimizer steps."""

    description: str

    def step(self, batches: list[Batch]) -> tuple[float, float]:
        """One optimizer step; the mean loss in nats per token, and the gradient norm before clipping."""


class MegakorTrainer:
    """`megakor pretrain`'s engine: DeepSpeed with ZeRO-1, in one process unless `parallel` says otherwise."""

    def __init__(self, case: Case, parallel: ParallelConfig | None = None) -> None:
        config = EngineConfig(
            run="",
            parallel=parallel or ParallelConfig(),
            train=case.train,
            optimizer=OptimizerConfig(lr=LEARNING_RATE),
        )
        dims = ParallelDims.from_config(config.parallel, dist.get_world_size())
        self.engine = Engine(config, case.model, case.vocabulary, dims, SeededValues(case.model, case.train.seed))
        self.description = f"megakor, {case.train.precision.value}, ZeRO-1"

    def step(self, batches: list[Batch]) -> tuple[float, float]:
        result = self.engine.train_step(batches, LEARNING_RATE, step=0)
        return result.loss, result.grad_norm


class TransformersTrainer:
    """`GPTNeoXForCausalLM` with scaled-dot-product attention and fused AdamW, in fp32 or under bf16 autocast."""

    def __init__(self, case: Case) -> None:
        self.model = reference_model(case)
        self.weights = dict(self.model.named_parameters())
        self.autocast = case.train.precision is Precision.bf16
        self.description = f"transformers, {'fp32 weights under bf16 autocast' if self.autocast else 'fp32'}"
        self.clip = case.train.clip_grad_norm
        self.optimizer = adamw(self.weights)

    def forward_backward(self, batch: Batch) -> torch.Tensor:
        """Back-propagate a micro-batch's part of the mean loss; returns it."""
        input_ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits = self.model(input_ids, use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        loss = loss / batch.num_loss_tokens
        loss.backward()
        return loss.detach()

    def step(self, batches: list[Batch]) -> tuple[float, float]:
        loss = sum((self.forward_backward(batch) for batch in batches), start=torch.zeros(()))
        norm = nn.utils.clip_grad_norm_(self.weights.values(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss), float(norm)


class MasterWeightsTrainer(TransformersTrainer):
    """The same with bf16 weights, and fp32 master weights that gradients are accumulated for, as DeepSpeed does."""

    def __init__(self, case: Case) -> None:
        super().__init__(replace(case, train=replace(case.train, precision=Precision.fp32)))
        self.description = "transformers, bf16 weights with fp32 masters and fp32 accumulation"
        self.masters = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.model.bfloat16()
        self.weights = dict(self.model.named_parameters())
        for name, weight in self.weights.items():
            master = self.masters[name]
            master.grad = torch.zeros_like(master)
            weight.register_post_accumulate_grad_hook(lambda weight, master=master: accumulate(weight, master))
        self.optimizer = adamw(self.masters)

    def step(self, batches: list[Batch]) -> tuple[float, float]:
        loss = sum((self.forward_backward(batch) for batch in batches), start=torch.zeros(()))
        norm = nn.utils.clip_grad_norm_(self.masters.values(), self.clip)
        self.optimizer.step()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.masters[name])
        self.optimizer.zero_grad(set_to_none=False)
        return float(loss), float(norm)


def accumulate(weight: torch.Tensor, master: torch.Tensor) -> None:
    """Move a weight's gradient into its master's, as soon as it is there."""
    assert weight.grad is not None
    assert master.grad is not None
    master.grad += weight.grad
    weight.grad = None


def reference_model(case: Case) -> GPTNeoXForCausalLM:
    """`transformers`' model with megakor's initial weights, fp32."""
    config = GPTNeoXConfig(**model_json(case.model, case.vocabulary, 0, Precision.fp32))
    config._attn_implementation = "sdpa"
    model = GPTNeoXForCausalLM(config).train()
    weights = {spec.name: initial_value(spec, case.train.seed) for spec in parameter_specs(case.model)}
    if hasattr(model, "lm_head"):  # what transformers 5 calls the output projection within a model
        weights = {name.replace("embed_out", "lm_head"): value for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(case.model.tie_word_embeddings and name == "lm_head.weight" for name in missing)
    return model


def adamw(weights: Mapping[str, torch.Tensor]) -> torch.optim.AdamW:
    """Megakor's optimizer over another's weights."""
    groups = [
        {"params": [weight for weight in weights.values() if weight.dim() > 1], "weight_decay": 0.1},
        {"params": [weight for weight in weights.values() if weight.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
