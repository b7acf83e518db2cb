"""Every layout of a model on some accelerators: those that the rules allow and that fit, by predicted step time.

    sizes that multiply to the ranks ─► rules of `megakor.config.checks` ─► memory ─► step time ─► what bounds it

A layout is a set of overrides, so that the best one can be pasted behind `megakor pretrain`.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megakor.config.checks import check_fit, check_parallel
from megakor.config.schema import ActivationCheckpointing, ParallelConfig, PretrainConfig, TrainConfig
from megakor.parallel.dims import ParallelDims, smallest_world_size
from megakor.plan.memory import StageMemory
from megakor.plan.partition import Stage
from megakor.plan.plan import Subject, cut, memory_of, time_of
from megakor.plan.time import StepTime

KEYS = (
    "parallel.tensor_parallel_size",
    "parallel.pipeline_parallel_size",
    "parallel.context_parallel_size",
    "parallel.data_parallel_size",
    "parallel.sequence_parallel",
    "parallel.zero_stage",
    "parallel.offload_optimizer",
    "parallel.offload_parameters",
    "train.micro_batch_size",
    "train.activation_checkpointing",
)
"""What makes a layout."""
RECOMPUTED = ActivationCheckpointing.none, ActivationCheckpointing.selective, ActivationCheckpointing.full
"""The least first."""
OFFLOADED: tuple[dict[str, Any], ...] = (
    {"offload_optimizer": False, "offload_parameters": False},
    {"offload_optimizer": True, "offload_parameters": False},
    {"offload_optimizer": True, "offload_parameters": True},
)
MOST_CHANGES = 2
"""Keys of a layout that are changed together when one that does not fit is mended."""
COMPUTE_BOUND = 0.1
"""Below this share of the step, what is lost to one thing does not bound it."""
BOUNDS = {
    "recompute": "memory: recomputation",
    "tensor": "tensor communication",
    "context": "context communication",
    "transfers": "pipeline transfers",
    "bubble": "pipeline bubble",
    "replicas": "replicas' communication",
    "optimizer": "optimizer's update",
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
        """What makes a run take this layout, as a command line has it."""
        return {key: written(value) for key, value in values(self.parallel, self.train).items()}


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        layouts: those that fit, fastest first.
        left_out: how many others there were, by the reason.
    """

    layouts: list[Layout]
    left_out: dict[str, int]


def values(parallel: ParallelConfig, train: TrainConfig) -> dict[str, Any]:
    """What makes a layout, by key."""
    sections = {"parallel": parallel, "train": train}
    return {key: getattr(sections[key.partition(".")[0]], key.partition(".")[2]) for key in KEYS}


def written(value: Any) -> str:
    """A value as a command line has it."""
    return str(getattr(value, "value", value)).lower()


def changed(config: PretrainConfig, changes: dict[str, Any]) -> PretrainConfig:
    """The configuration with other values of some keys of its layout."""
    parts: dict[str, dict[str, Any]] = {"parallel": {}, "train": {}}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        parts[section][name] = value
    return replace(
        config,
        parallel=replace(config.parallel, **parts["parallel"]),
        train=replace(config.train, **parts["train"]),
    )


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def broken_rule(config: PretrainConfig, subject: Subject) -> str | None:
    """The rule that a layout breaks, if any, without its figures."""
    try:
        check_parallel(config.parallel, config.train, config.optimizer.name)
        check_fit(config, subject.model)
    except ValueError as error:
        return re.split("[;:]", re.sub(r"=[^ ;:]+|( / .*)? = \d+", "", str(error)))[0]
    if config.parallel.tensor_parallel_size > subject.hardware.per_node:
        return f"tensor ranks must share a node of {subject.hardware.per_node}"
    return None


def fullest(config: PretrainConfig, subject: Subject, dims: ParallelDims, stages: list[Stage]) -> StageMemory:
    """Memory of the stage that takes most."""
    return max(memory_of(config, subject, dims, stages), key=lambda stage: stage.total)


def candidates(config: PretrainConfig, subject: Subject, left_out: Counter[str]) -> Iterator[PretrainConfig]:
    """The layouts that the rules allow, without offloading; those that they do not are counted by the rule."""
    world_size = subject.world_size
    for tensor in divisors(world_size):
        for pipeline in divisors(world_size // tensor):
            for context in divisors(world_size // tensor // pipeline):
                for stage, sequence in itertools.product((1, 2, 3), (False, True)):
                    data = world_size // tensor // pipeline // context
                    sizes = dict(
                        zip(KEYS, (tensor, pipeline, context, data, sequence, stage, False, False), strict=False)
                    )
                    laid_out = changed(config, sizes)
                    broken = broken_rule(laid_out, subject)
                    if broken is None and config.train.global_batch_size % data:
                        broken = "the number of replicas must divide train.global_batch_size"
                    if broken is None:
                        yield laid_out
                    else:
                        left_out[broken] += 1


def micro_batch_sizes(train: TrainConfig, data: int) -> list[int]:
    """Powers of two that make each replica's part of the global batch up."""
    own = train.global_batch_size // data
    return [2**power for power in range(own.bit_length()) if own % 2**power == 0]


def least_saving(config: PretrainConfig, subject: Subject, dims: ParallelDims, stages: list[Stage]) -> Iterator[Layout]:
    """The layout, where it fits, with the least recomputation, and with offloading where something is recomputed."""
    for offloaded in OFFLOADED:
        laid_out = replace(config, parallel=replace(config.parallel, **offloaded))
        if any(offloaded.values()) and broken_rule(laid_out, subject) is not None:
            continue
        for kind in RECOMPUTED:
            tried = replace(laid_out, train=replace(config.train, activation_checkpointing=kind))
            memory = fullest(tried, subject, dims, stages)
            if memory.total <= subject.capacity:
                yield Layout(tried.parallel, tried.train, dims, memory, time_of(tried, subject, dims, stages))
                if kind is ActivationCheckpointing.none:
                    return
                break


def search(config: PretrainConfig, subject: Subject) -> Found:
    """Look at every layout of the subject's accelerators."""
    layouts: list[Layout] = []
    left_out: Counter[str] = Counter()
    stages: dict[tuple[int, int], list[Stage]] = {}
    for laid_out in candidates(config, subject, left_out):
        dims = ParallelDims.from_config(laid_out.parallel, subject.world_size)
        place = dims.tensor, dims.pipeline
        if place not in stages:
            stages[place] = cut(laid_out, subject, dims)
        for size in micro_batch_sizes(config.train, dims.data):
            tried = changed(laid_out, {"train.micro_batch_size": size})
            found = list(least_saving(tried, subject, dims, stages[place]))
            layouts += found
            if not found:
                left_out["do not fit into memory"] += 1
    layouts.sort(key=lambda layout: (layout.time.seconds, layout.memory.total))
    return Found(layouts, dict(left_out.most_common()))


def other_values(config: PretrainConfig, subject: Subject) -> dict[str, list[Any]]:
    """What each key of a layout could be instead, but for the number of replicas, which follows from the others."""
    now = values(config.parallel, config.train)
    sizes, switch = divisors(subject.world_size), [False, True]
    batches = [2**power for power in range(config.train.global_batch_size.bit_length())]
    known = dict(
        zip(KEYS, (sizes, sizes, sizes, [], switch, [1, 2, 3], switch, switch, batches, RECOMPUTED), strict=True)
    )
    return {key: [value for value in known[key] if value != now[key]] for key in KEYS}


def mended(config: PretrainConfig, subject: Subject) -> tuple[dict[str, str], Layout] | None:
    """A layout that fits, and what to change to get it: of those with the fewest other keys the fastest.

    None where no layout fits.
    """
    free = changed(config, {"parallel.data_parallel_size": None})
    others = other_values(config, subject)
    for count in range(1, MOST_CHANGES + 1):
        fits = []
        for keys in itertools.combinations(KEYS, count):
            for chosen in itertools.product(*(others[key] for key in keys)):
                changes = dict(zip(keys, chosen, strict=True))
                tried = changed(free, changes)
                if subject.world_size % smallest_world_size(tried.parallel) or broken_rule(tried, subject) is not None:
                    continue
                dims = ParallelDims.from_config(tried.parallel, subject.world_size)
                if tried.train.global_batch_size % (tried.train.micro_batch_size * dims.data):
                    continue
                stages = cut(tried, subject, dims)
                memory = fullest(tried, subject, dims, stages)
                if memory.total <= subject.capacity:
                    layout = Layout(tried.parallel, tried.train, dims, memory, time_of(tried, subject, dims, stages))
                    fits.append(({key: written(value) for key, value in changes.items()}, layout))
        if fits:
            return min(fits, key=lambda found: found[1].time.seconds)
    found = search(config, subject).layouts
    return (found[0].overrides, found[0]) if found else None
