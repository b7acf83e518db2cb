"""Engines of tiny models over made-up batches, and the same steps by plain torch on one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from megakor.config.schema import ModelConfig, PretrainConfig
from megakor.data.stream import Batch
from megakor.model.gpt_neox import GPTNeoXForCausalLM
from megakor.model.loss import token_losses
from megakor.model.parameters import initialize_parameters
from megakor.parallel.dims import ParallelDims
from megakor.train.engine import Engine, StepResult
from megakor.train.values import SeededValues
from tests.distributed.runs import Made, configuration

ROWS, NUM_TOKENS = 64, 50
GLOBAL_BATCH, MICRO_BATCH, SEQ = 8, 2, 16
LR, CLIP = 0.5, 0.3
"""The norms lie above `CLIP`, and AdamW's epsilon above the gradients, so that updates show how much was clipped."""

RULES = {
    "model__num_attention_heads": 4, "model__initializer_range": 0.1, "train__sequence_length": SEQ,
    "train__clip_grad_norm": CLIP, "optimizer__lr": LR, "optimizer__eps": 1.0,
}  # fmt: skip


def config_of(**changes: Any) -> PretrainConfig:
    return configuration(Made("", "", ""), Path("run"), **RULES | changes)


def model_of(config: PretrainConfig) -> ModelConfig:
    return replace(config.model, vocab_size=ROWS)


def make_engine(config: PretrainConfig) -> Engine:
    """Every rank of the process group calls."""
    dims, model = ParallelDims.from_config(config.parallel, dist.get_world_size()), model_of(config)
    return Engine(config, model, NUM_TOKENS, dims, SeededValues(model, config.train.seed))


def tokens(step: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [global batch, seq + 1] of a step, and a mask of the labels; whole rows of it are zero."""
    rng = np.random.default_rng(step)
    mask = (rng.random((GLOBAL_BATCH, SEQ)) < 0.7).astype(np.float32)
    mask[step % GLOBAL_BATCH] = 0.0
    return rng.integers(0, NUM_TOKENS, (GLOBAL_BATCH, SEQ + 1)), mask


def micro_batches(step: int, data_rank: int = 0, data: int = 1, with_documents: bool = False) -> list[Batch]:
    """A data rank's part of the global batch of a step; documents begin at other places in every row."""
    ids, mask = tokens(step)
    documents = (np.random.default_rng((1, step)).random(mask.shape) < 0.2).cumsum(axis=1, dtype=np.int32)
    share = GLOBAL_BATCH // data
    starts = range(data_rank * share, (data_rank + 1) * share, MICRO_BATCH)
    parts = [slice(start, start + MICRO_BATCH) for start in starts]
    return [
        Batch(ids[part, :-1], ids[part, 1:], mask[part], int(mask.sum()), documents[part] if with_documents else None)
        for part in parts
    ]


def train(engine: Engine, num_steps: int, with_documents: bool = False) -> list[StepResult]:
    """The first steps of a run."""
    return [
        engine.train_step(micro_batches(step, engine.data_rank, engine.dims.data, with_documents), LR, step)
        for step in range(num_steps)
    ]


def plain_steps(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> list[StepResult]:
    """Steps of a whole model by torch's own clipping, of what the optimizer updates."""
    updated = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    results = []
    for step in range(num_steps):
        ids, mask = (torch.from_numpy(array) for array in tokens(step))
        losses = token_losses(model(ids[:, :-1]), ids[:, 1:], NUM_TOKENS)
        loss = (losses * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(updated, CLIP)
        optimizer.step()
        results.append(StepResult(loss.item(), norm.item()))
    return results


def by_hand(config: PretrainConfig, num_steps: int) -> tuple[list[StepResult], dict[str, torch.Tensor]]:
    """The same steps on a whole model by torch's own clipping and AdamW; results, and the weights after them."""
    model = GPTNeoXForCausalLM(model_of(config))
    initialize_parameters(model.named_parameters(), model_of(config), config.train.seed)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.optimizer.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=LR, betas=(config.optimizer.beta1, config.optimizer.beta2), eps=config.optimizer.eps,
    )  # fmt: skip
    return plain_steps(model, optimizer, num_steps), {
        name: parameter.detach() for name, parameter in model.named_parameters()
    }


class Heldout:
    """A held-out set of two windows more than a round has."""

    num_windows, sequence_length = GLOBAL_BATCH + 2, SEQ

    def windows(self, start: int, count: int) -> Batch:
        ids = np.random.default_rng(77).integers(0, NUM_TOKENS, (self.num_windows + 2 * count * GLOBAL_BATCH, SEQ + 1))
        mask = np.ones((len(ids), SEQ), dtype=np.float32)
        mask[self.num_windows :] = 0.0
        part = slice(start, start + count)
        return Batch(ids[part, :-1], ids[part, 1:], mask[part], self.num_windows * SEQ)
