"""`train.compile`: blocks that torch.compile has translated train the same model."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from megakor.config.schema import ActivationCheckpointing
from megakor.model.gpt_neox import Block
from megakor.train.engine import StepResult
from tests.ranks import run_ranks
from tests.train.engines import config_of, make_engine, train

FULL = {"train__activation_checkpointing": ActivationCheckpointing.full}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "tensor and sequence": (2, {"parallel__tensor_parallel_size": 2, "parallel__sequence_parallel": True}),
    "pipeline": (2, {"parallel__pipeline_parallel_size": 2}),
    "zero 3": (2, {"parallel__zero_stage": 3}),
    "full checkpointing": (1, FULL),
    "documents": (1, {}),
    "documents, pipeline, full checkpointing": (2, {"parallel__pipeline_parallel_size": 2} | FULL),
}


def plain_and_compiled(changes: dict[str, Any], with_documents: bool) -> list[list[StepResult]]:
    """The first steps of a rank, without and with compiled blocks."""
    found = []
    for compiled in (False, True):
        engine = make_engine(config_of(train__compile=compiled, **changes))
        blocks = [module for module in engine.built.module.modules() if isinstance(module, Block)]
        assert blocks
        assert all(block.recomputed is ("train__activation_checkpointing" in changes) for block in blocks)
        assert all((block._compiled_call_impl is not None) is compiled for block in blocks)
        found.append(train(engine, 3, with_documents))
    return found


@pytest.mark.skipif(shutil.which("c++") is None, reason="on CPUs torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", LAYOUTS)
def test_compiled_blocks_train_the_same(name: str) -> None:
    world_size, changes = LAYOUTS[name]
    for plain, compiled in run_ranks(plain_and_compiled, world_size, changes, "documents" in name):
        assert [result.loss for result in compiled] == pytest.approx([result.loss for result in plain], rel=1e-6)
        assert [r.grad_norm for r in compiled] == pytest.approx([r.grad_norm for r in plain], rel=1e-5)
