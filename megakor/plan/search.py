"""Every layout of a model on some accelerators: those that the rules allow and that fit, by predicted step time.

    sizes that multiply to the ranks ─► rules of `megakor.config.checks` ─► memory ─► step time ─► what bounds it

A layout is a set of overrides, so that the best one can be pasted behind `megakor pretrain`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from megakor.config.checks import check_fit, check_parallel
from megakor.config.schema import ActivationCheckpointing, ParallelConfig, PlanConfig, PlanSearchConfig, TrainConfig
from megakor.parallel.dims import ParallelDims
from megakor.plan.memory import StageMemory
from megakor.plan.plan import Subject, stages_of, time_of
from megakor.plan.time import StepTime

AnyPlan = TypeVar("AnyPlan", PlanConfig, PlanSearchConfig)

COMPUTE_BOUND = 0.1
"""Below this share of the step, what is lost to one thing does not bound it."""
BOUNDS = {
    "recompute": "memory: recomputation",
    "tensor": "tensor communication",
    "context": "context communication",
    "transfers": "pipeline transfers",
    "bubble": "pipeline bubble",
    "replicas": "replicas' communication",
    "optimizer": "the optimizer's update",
}


@dataclass(frozen=True)
class Layout:
    """A layout that fits.

    Attributes:
        memory: of its fullest stage.
    """

    parallel: ParallelConfig
    train: TrainConfig
    dims: ParallelDims
    memory: StageMemory
    time: StepTime

    @property
    def bound(self) -> str:
        """What the most time is lost to; computation where nothing takes a tenth of the step."""
        lost = {name: getattr(self.time, name) for name in BOUNDS}
        worst = max(lost, key=lambda name: lost[name])
        return BOUNDS[worst] if lost[worst] > COMPUTE_BOUND * self.time.seconds else "computation"

    @property
    def overrides(self) -> dict[str, str]:
        """What makes a run take this layout."""
        return overrides(self.parallel, self.train)


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        layouts: those that fit, fastest first.
        left_out: how many others there were, by the reason.
    """

    layouts: list[Layout]
    left_out: dict[str, int]


def overrides(parallel: ParallelConfig, train: TrainConfig) -> dict[str, str]:
    """The keys of a layout and their values, as a command line has them."""
    values = {
        "parallel.tensor_parallel_size": parallel.tensor_parallel_size,
        "parallel.pipeline_parallel_size": parallel.pipeline_parallel_size,
        "parallel.context_parallel_size": parallel.context_parallel_size,
        "parallel.data_parallel_size": parallel.data_parallel_size,
        "parallel.sequence_parallel": parallel.sequence_parallel,
        "parallel.zero_stage": parallel.zero_stage,
        "parallel.offload_optimizer": parallel.offload_optimizer,
        "parallel.offload_parameters": parallel.offload_parameters,
        "train.micro_batch_size": train.micro_batch_size,
        "train.activation_checkpointing": train.activation_checkpointing.value,
    }
    return {key: str(value).lower() for key, value in values.items()}


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def candidates(base: ParallelConfig, world_size: int, per_node: int) -> Iterator[tuple[ParallelConfig, str | None]]:
    """Every way to lay out so many ranks, and why one is left out before the rules are asked."""
    for tensor in divisors(world_size):
        if tensor > per_node:
            yield base, f"tensor ranks on more than one node of {per_node}"
            continue
        for pipeline in divisors(world_size // tensor):
            for context in divisors(world_size // tensor // pipeline):
                for stage in (1, 2, 3):
                    for sequence in (False, True):
                        for optimizer, parameters in ((False, False), (True, False), (True, True)):
                            yield (
                                replace(
                                    base,
                                    tensor_parallel_size=tensor,
                                    pipeline_parallel_size=pipeline,
                                    context_parallel_size=context,
                                    data_parallel_size=world_size // tensor // pipeline // context,
                                    sequence_parallel=sequence,
                                    zero_stage=stage,
                                    offload_optimizer=optimizer,
                                    offload_parameters=parameters,
                                ),
                                None,
                            )


def trains(train: TrainConfig, data: int) -> Iterator[TrainConfig]:
    """The micro-batch sizes that make the global batch up, powers of two, with every kind of recomputation."""
    size = 1
    while train.global_batch_size % (size * data) == 0:
        for kind in ActivationCheckpointing:
            yield replace(train, micro_batch_size=size, activation_checkpointing=kind)
        size *= 2


def broken_rule(config: AnyPlan, subject: Subject) -> str | None:
    """The key of the rule that a layout breaks, if any."""
    try:
        check_parallel(config.parallel, config.train, config.optimizer.name)
        check_fit(config, subject.model)
    except ValueError as error:
        return re.split("[= ]", str(error), maxsplit=1)[0]
    return None


def search(config: AnyPlan, subject: Subject) -> Found:
    """Look at every layout of the subject's accelerators."""
    layouts, left_out = [], Counter[str]()
    for parallel, reason in candidates(config.parallel, subject.world_size, subject.hardware.per_node):
        laid_out = replace(config, parallel=parallel)
        broken = reason is None and broken_rule(laid_out, subject)
        if reason or broken:
            left_out[reason or f"{broken} breaks a rule"] += 1
            continue
        dims = ParallelDims.from_config(parallel, subject.world_size)
        choices = list(trains(config.train, dims.data))
        if not choices:
            left_out["replicas do not divide the global batch"] += 1
        for train in choices:
            tried = replace(laid_out, train=train)
            memory, layers = stages_of(tried, subject, dims)
            fullest = max(memory, key=lambda stage: stage.total)
            if fullest.total > subject.capacity:
                left_out["do not fit into memory"] += 1
                continue
            layouts.append(Layout(parallel, train, dims, fullest, time_of(tried, subject, dims, layers)))
    layouts.sort(key=lambda layout: (layout.time.seconds, layout.memory.total))
    return Found(layouts, dict(left_out.most_common()))


def cheapest_change(config: PlanConfig, subject: Subject) -> tuple[dict[str, str], Layout] | None:
    """Of the layouts that fit, one that needs the fewest other keys, and of those the fastest: what to change, and it."""
    now = overrides(replace(config.parallel, data_parallel_size=None), config.train)

    def changes(layout: Layout) -> dict[str, str]:
        free = {**layout.overrides, "parallel.data_parallel_size": now["parallel.data_parallel_size"]}
        return {key: value for key, value in free.items() if value != now[key]}

    found = search(config, subject).layouts
    if not found:
        return None
    best = min(found, key=lambda layout: (len(changes(layout)), layout.time.seconds))
    return changes(best), best
