"""A plan: a configuration goes in; parameters, memory, time and cost of the run come out.

    configuration ─► Subject (model, accelerators, what is trained) ─► stages ─► memory, traffic, step time ─► cost

Nothing is built and PyTorch is not loaded: a plan takes about a second.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from megakor.config.cluster_checks import count_and_kind
from megakor.config.schema import ModelConfig, PlanConfig, PlanSearchConfig, PretrainConfig
from megakor.model.specs import EMBEDDING, FINAL_NORM, HEAD, parameter_specs, resolve_vocabulary
from megakor.parallel.dims import ParallelDims, smallest_world_size
from megakor.plan.hardware import Hardware, find_hardware
from megakor.plan.memory import GIB, StageMemory, stage_memory
from megakor.plan.partition import Layer, Stage, layers_of, partition
from megakor.plan.time import StepTime, adapter_parameters, step_time
from megakor.plan.traffic import Traffic, stage_traffic
from megakor.plan.work import Adapters, StageLayers

DEFAULT_KIND = "a100-80g"
"""The accelerators of a plan that names none."""


@dataclass(frozen=True)
class Subject:
    """What is planned, whatever its layout.

    Attributes:
        model: the architecture, `vocab_size` resolved.
        world_size: ranks, one for each accelerator.
        adapters: what is trained; None: all weights.
        layers: of the model.
    """

    model: ModelConfig
    hardware: Hardware
    world_size: int
    adapters: Adapters | None
    layers: list[Layer]

    @property
    def capacity(self) -> int:
        """Bytes of an accelerator's memory."""
        return round(self.hardware.memory_gib * GIB)

    @classmethod
    def of(cls, config: PlanConfig | PlanSearchConfig) -> Subject:
        """From a configuration.

        Raises:
            ValueError: the vocabulary is open and there is no tokenizer, or nobody knows the accelerator.
        """
        gpus = config.cluster.gpus
        count, kind = (smallest_world_size(config.parallel), DEFAULT_KIND) if gpus is None else count_and_kind(gpus)
        hardware = find_hardware(kind)
        if config.cluster.ranks_per_node is not None:
            hardware = replace(hardware, per_node=config.cluster.ranks_per_node)
        targets = tuple(target.value for target in config.lora.targets)
        adapters = Adapters(config.lora.rank, targets) if config.lora.rank else None
        model = with_vocabulary(config)
        return cls(model, hardware, count, adapters, layers_of(model))


def with_vocabulary(config: PlanConfig | PlanSearchConfig) -> ModelConfig:
    """The architecture with its embedding rows: given, or the tokenizer's."""
    if config.model.vocab_size is not None:
        return config.model
    if not Path(config.data.tokenizer).is_dir():
        raise ValueError(
            f"model.vocab_size=null must be a number of rows, or data.tokenizer={config.data.tokenizer} a tokenizer's "
            "folder, which tells it"
        )
    from megakor.tokenizer.tokenizer import Tokenizer  # SentencePiece is loaded only where it is needed

    return resolve_vocabulary(config.model, Tokenizer.load(config.data.tokenizer).vocab_size)


@dataclass(frozen=True)
class Cost:
    """Of the whole run."""

    days: float
    gpu_hours: float
    kwh: float
    krw: float
    usd: float


@dataclass(frozen=True)
class Plan:
    """A run, as it will be.

    Attributes:
        parameters: of the model, by part.
        trained: parameters that have gradients.
        stages: memory of a rank of each pipeline stage.
        traffic: what a rank of each stage puts into collectives and sends in a step.
        num_micro_batches: of a rank in a step.
        tokens: of the whole run; earlier, smaller batches and rows are counted as the last ones.
    """

    name: str
    hardware: Hardware
    dims: ParallelDims
    zero_stage: int
    parameters: dict[str, int]
    trained: int
    stages: list[StageMemory]
    traffic: list[list[Traffic]]
    micro_batch_size: int
    sequence_length: int
    num_micro_batches: int
    num_steps: int
    tokens: int
    time: StepTime
    cost: Cost

    @property
    def fullest(self) -> StageMemory:
        """The stage that takes most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def capacity(self) -> int:
        """Bytes of an accelerator's memory."""
        return round(self.hardware.memory_gib * GIB)

    @property
    def fits(self) -> bool:
        return self.fullest.total <= self.capacity


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """The model's parameters by part; a tied output projection has none of its own."""
    found = Counter({"embedding": 0, "attention": 0, "feed_forward": 0, "norms": 0, "output": 0})
    ends = {EMBEDDING: "embedding", FINAL_NORM: "norms", HEAD: "output"}
    for spec in parameter_specs(model):
        prefix = spec.name.rpartition(".")[0]
        part = ends.get(prefix) or next(
            part for word, part in ((".attention", "attention"), (".mlp", "feed_forward"), ("layernorm", "norms"))
            if word in prefix
        )  # fmt: skip
        found[part] += math.prod(spec.shape)
    return dict(found)


def inference_gb(num_parameters: int, bits: int) -> float:
    """The quick rule that is told of serving a model: M = P × 4 bytes / (32 / Q) × 1.2, in 10^9 bytes as it is told.

    For inference only: a training run holds gradients, optimizer and activations besides.
    """
    return num_parameters * 4 / (32 / bits) * 1.2 / 1e9


def cut(config: PretrainConfig, subject: Subject, dims: ParallelDims) -> list[Stage]:
    """The pipeline stages of a layout."""
    return partition(subject.layers, config.parallel.pipeline_partition, dims.pipeline, dims.tensor)


def memory_of(config: PretrainConfig, subject: Subject, dims: ParallelDims, stages: list[Stage]) -> list[StageMemory]:
    """Memory of a rank of every stage."""
    on_host = not subject.hardware.overlaps
    return [stage_memory(config, subject.model, dims, stage, subject.adapters, on_host) for stage in stages]


def time_of(config: PretrainConfig, subject: Subject, dims: ParallelDims, stages: list[Stage]) -> StepTime:
    """The time of a step."""
    return step_time(
        subject.model, config.parallel, config.train, dims, subject.hardware, [stage.held for stage in stages],
        config.optimizer.name, subject.adapters,
    )  # fmt: skip


def make_plan(config: PlanConfig) -> Plan:
    """The plan of a run.

    Raises:
        ValueError: the layout's sizes do not divide the accelerators, nobody knows them, or the vocabulary is open.
    """
    subject = Subject.of(config)
    model, train = subject.model, config.train
    dims = ParallelDims.from_config(config.parallel, subject.world_size)
    stages = cut(config, subject, dims)
    memory = memory_of(config, subject, dims, stages)
    time = time_of(config, subject, dims, stages)
    adapters = subject.adapters
    trained = sum(parameters_by_part(model).values())
    if adapters is not None:
        whole = StageLayers(range(model.num_hidden_layers), embeds=False, projects=False)
        trained = round(adapter_parameters(model, adapters, whole, 1))
    traffic = []
    for stage in stages:
        own = None if adapters is None else round(adapter_parameters(model, adapters, stage.held, dims.tensor))
        traffic.append(stage_traffic(config, model, dims, stage, adapters, own))
    hours = time.seconds * train.num_steps / 3600
    gpu_hours = hours * subject.world_size
    krw = gpu_hours * config.cluster.price_krw
    return Plan(
        name=config.name,
        hardware=subject.hardware,
        dims=dims,
        zero_stage=config.parallel.zero_stage,
        parameters=parameters_by_part(model),
        trained=trained,
        stages=memory,
        traffic=traffic,
        micro_batch_size=train.micro_batch_size,
        sequence_length=train.sequence_length,
        num_micro_batches=dims.num_micro_batches(train),
        num_steps=train.num_steps,
        tokens=train.num_steps * train.global_batch_size * train.sequence_length,
        time=time,
        cost=Cost(
            days=hours / 24,
            gpu_hours=gpu_hours,
            kwh=gpu_hours * subject.hardware.watts / 1000,
            krw=krw,
            usd=krw / config.cluster.krw_per_usd,
        ),
    )
