"""Contexts of 32,768 tokens, split over two ranks: the loss and gradient norm of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megakor.data.stream import Batch
from megakor.parallel.dims import ParallelDims
from megakor.train.engine import Engine, StepResult
from megakor.train.values import SeededValues
from tests.distributed.runs import Made, configuration
from tests.ranks import run_ranks

LENGTH, NUM_TOKENS = 32_768, 64
TINY = {
    "model__hidden_size": 16, "model__num_hidden_layers": 1, "model__intermediate_size": 32, "model__rotary_pct": 1.0,
    "model__vocab_size": NUM_TOKENS, "model__max_position_embeddings": LENGTH,
    "train__sequence_length": LENGTH, "train__global_batch_size": 1, "train__micro_batch_size": 1,
}  # fmt: skip


def one_step(changes: dict[str, Any]) -> StepResult:
    config = configuration(Made("-", "-", "-"), Path("-"), **TINY, **changes)
    dims = ParallelDims.from_config(config.parallel, dist.get_world_size())
    engine = Engine(config, config.model, NUM_TOKENS, dims, SeededValues(config.model, 1))
    tokens = np.random.default_rng(1).integers(0, NUM_TOKENS, (1, LENGTH + 1))
    tokens[0, LENGTH // 2 :] = tokens[0, : LENGTH // 2 + 1]  # so that what is far away matters
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((1, LENGTH), np.float32), LENGTH)
    return engine.train_step([batch], 1e-3, 0)


def test_half_a_context_on_each_rank() -> None:
    (whole,) = run_ranks(one_step, 1, {})
    for split in run_ranks(one_step, 2, {"parallel__context_parallel_size": 2}):
        assert split.loss == pytest.approx(whole.loss, rel=1e-5)
        assert split.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
