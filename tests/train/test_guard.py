"""A step whose loss or gradients are not finite changes nothing, in every engine.

Every layout runs the steps A, bad ones of all kinds and B, and the steps A and B alone: bitwise the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime import bf16_optimizer

from megakor.data.stream import Batch
from megakor.train.engine import Engine, StepResult
from megakor.train.fragments import is_partitioned
from megakor.train.optimizer import optimizer_steps
from tests.distributed.runs import ADAFACTOR, BF16, PP2, TIED, zero
from tests.ranks import run_ranks
from tests.train.engines import config_of, make_engine, micro_batches

LR = 0.05
UNCLIPPED = {"train__clip_grad_norm": 0.0}
OFFLOAD = {"parallel__offload_optimizer": True}
OFFLOAD_BOTH = OFFLOAD | {"parallel__offload_parameters": True}
TP2 = {"parallel__tensor_parallel_size": 2}
SP2 = TP2 | {"parallel__sequence_parallel": True}
CP2 = {"parallel__context_parallel_size": 2}

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "zero0": zero(0),
        "zero0 adafactor unclipped": zero(0) | ADAFACTOR | UNCLIPPED,
        "zero1": zero(1),
        "zero2 bf16 unclipped": zero(2) | BF16 | UNCLIPPED,
        "zero3 adafactor": zero(3) | ADAFACTOR,
    },
    2: {
        "dp2 zero0 unclipped": zero(0) | UNCLIPPED,
        "dp2 zero0 adafactor": zero(0) | ADAFACTOR,
        "dp2 zero1 adafactor unclipped": zero(1) | ADAFACTOR | UNCLIPPED,
        "dp2 zero1 bf16": zero(1) | BF16,
        "dp2 zero1 bf16 adafactor unclipped": zero(1) | BF16 | ADAFACTOR | UNCLIPPED,
        "dp2 zero1 offload unclipped": zero(1) | OFFLOAD | UNCLIPPED,
        "dp2 zero1 offload bf16": zero(1) | OFFLOAD | BF16,
        "dp2 zero2": zero(2),
        "dp2 zero2 bf16 adafactor": zero(2) | BF16 | ADAFACTOR,
        "dp2 zero2 offload bf16 unclipped": zero(2) | OFFLOAD | BF16 | UNCLIPPED,
        "dp2 zero3 unclipped": zero(3) | UNCLIPPED,
        "dp2 zero3 bf16 adafactor": zero(3) | BF16 | ADAFACTOR,
        "dp2 zero3 offload bf16": zero(3) | OFFLOAD_BOTH | BF16,
        "tp2 bf16": TP2 | BF16,
        "tp2 offload": TP2 | OFFLOAD,
        "tp2 zero3 offload unclipped": TP2 | zero(3) | OFFLOAD_BOTH | UNCLIPPED,
        "tp2 sp unclipped": SP2 | UNCLIPPED,
        "tp2 sp zero3 bf16 adafactor": SP2 | zero(3) | BF16 | ADAFACTOR,
        "cp2 bf16 unclipped": CP2 | BF16 | UNCLIPPED,
        "cp2 zero2": CP2 | zero(2),
        "pp2": PP2,
        "pp2 tied adafactor unclipped": PP2 | TIED | ADAFACTOR | UNCLIPPED,
        "pp2 tied bf16": PP2 | TIED | BF16,
        "pp2 bf16 adafactor unclipped": PP2 | BF16 | ADAFACTOR | UNCLIPPED,
    },
    4: {"tp2 pp2 sp": SP2 | PP2},
}
ALL = [name for layouts in LAYOUTS.values() for name in layouts]


def step(engine: Engine, number: int) -> StepResult:
    return engine.train_step(micro_batches(number, engine.data_rank, engine.dims.data), LR, number)


@contextmanager
def gradient(engine: Engine, parameter: int, value: float, micro_batch: int, rank: int) -> Iterator[None]:
    """Inside, one element of one parameter's gradient of one micro-batch of one rank is `value`."""
    seen = 0

    def plant(own: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen - 1 != micro_batch % engine.num_micro_batches:
            return own
        own = own.clone()
        own.view(-1)[own.numel() // 2] = value
        return own

    if dist.get_rank() != rank % dist.get_world_size():
        yield
        return
    hook = engine.built.named[parameter][1].register_hook(plant)
    yield
    hook.remove()
    assert seen == engine.num_micro_batches


@contextmanager
def loss(engine: Engine, value: float, micro_batch: int, rank: int) -> Iterator[None]:
    """Inside, the loss of one micro-batch of one rank is scaled by `value`."""
    real, seen = engine.tensors, 0

    def tensors(batch: Batch, scale: float) -> Any:
        nonlocal seen
        seen += 1
        return real(batch, value if seen - 1 == micro_batch % engine.num_micro_batches else scale)

    if dist.get_rank() == rank % dist.get_world_size():
        engine.tensors = tensors  # type: ignore[method-assign]
    yield
    engine.tensors = real  # type: ignore[method-assign]


BAD: dict[str, Callable[[Engine], Any]] = {
    "inf in the first micro-batch": lambda engine: gradient(engine, 0, math.inf, 0, rank=0),
    "NaN in the last micro-batch": lambda engine: gradient(engine, -1, math.nan, -1, rank=0),
    "-inf on the last rank": lambda engine: gradient(engine, 2, -math.inf, 0, rank=-1),
    "a loss of NaN": lambda engine: loss(engine, math.nan, 0, rank=-1),
    "an infinite loss": lambda engine: loss(engine, math.inf, -1, rank=-1),
}


def state(engine: Engine) -> list[torch.Tensor]:
    """A copy of all that a step changes on this rank."""
    low = [
        parameter.ds_tensor if is_partitioned(parameter) else parameter.detach()  # type: ignore[attr-defined]
        for _, parameter in engine.built.named
    ]
    kept = [piece.values for piece in engine.pieces]
    return [tensor.clone() for tensor in (*low, *kept, torch.tensor(optimizer_steps(engine.optimizer)))]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def run_layout(changes: dict[str, Any]) -> dict[str, Any]:
    config = config_of(**changes)
    plain, engine = make_engine(config), make_engine(config)
    wanted, first = [step(plain, 0)], state(plain)
    wanted, last = [*wanted, step(plain, 1)], state(plain)
    found, skipped, kept = [step(engine, 0)], [], {}
    for name, plant in BAD.items():
        with plant(engine):
            skipped.append(step(engine, 5))
        kept[name] = same(state(engine), first)
    found.append(step(engine, 1))
    return {
        "wanted": wanted, "found": found, "skipped": skipped, "kept": kept, "moves": not same(first, last),
        "same": same(state(engine), last), "steps": optimizer_steps(engine.optimizer),
    }  # fmt: skip


def run_layouts(layouts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    bf16_optimizer.see_memory_usage = lambda *_, **__: None  # it collects garbage for a second
    return {name: run_layout(changes) for name, changes in layouts.items()}


@pytest.fixture(scope="module")
def ran() -> dict[str, list[dict[str, Any]]]:
    """What every rank found; pipelines in processes of their own (see `run_all`)."""
    found = {}
    for world_size, layouts in LAYOUTS.items():
        for pipelined in (False, True):
            own = {name: changes for name, changes in layouts.items() if (PP2.items() <= changes.items()) is pipelined}
            if own:
                ranks = run_ranks(run_layouts, world_size, own)
                found |= {name: [answers[name] for answers in ranks] for name in own}
    return found


@pytest.mark.parametrize("name", ALL)
def test_a_bad_step_is_skipped_on_every_rank(ran: dict, name: str) -> None:
    for rank in ran[name]:
        assert all(result.skipped and not math.isfinite(result.grad_norm) for result in rank["skipped"])
        assert rank["kept"] == dict.fromkeys(BAD, True)


@pytest.mark.parametrize("name", ALL)
def test_good_steps_are_what_they_would_have_been(ran: dict, name: str) -> None:
    for rank in ran[name]:
        assert rank["moves"]
        assert not any(result.skipped for result in rank["wanted"])
        assert rank["found"] == rank["wanted"]
        assert rank["same"]
        assert rank["steps"] == 2
