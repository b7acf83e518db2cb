"""The layouts that are run on this machine, and what the plan says of them: `tests.benchmarks.plan` runs them.

machine.json: what was measured, and what probes told of the hardware ─► rows, with what the plan says now
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakor.config.choices import ActivationCheckpointing, Precision
from megakor.config.schema import EngineConfig, ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megakor.parallel.dims import ParallelDims
from megakor.plan.hardware import Hardware
from megakor.plan.memory import stage_memory
from megakor.plan.partition import layers_of, partition
from megakor.plan.time import StepTime, step_time

MEASURED = Path(__file__).with_name("machine.json")
MODEL = ModelConfig(
    hidden_size=1024, num_hidden_layers=10, num_attention_heads=16, intermediate_size=4096, vocab_size=16384,
    rotary_pct=0.5,
)  # fmt: skip
SEQUENCE_LENGTH = 256
NUM_MICRO_BATCHES = 2  # of a replica: the second finds the gradients of the first
SETTINGS = {
    "zero_optimization": {
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
    }
}
"""ZeRO-3 would keep a billion weights gathered, more than this model has."""


@dataclass(frozen=True)
class Layout:
    """A layout on one or two ranks."""

    parallel: ParallelConfig
    ranks: int = 2
    checkpointing: ActivationCheckpointing = ActivationCheckpointing.none

    @property
    def dims(self) -> ParallelDims:
        return ParallelDims.from_config(self.parallel, self.ranks)

    def config(self, precision: Precision) -> EngineConfig:
        """The run."""
        train = TrainConfig(
            num_steps=1,
            global_batch_size=NUM_MICRO_BATCHES * self.dims.data,
            micro_batch_size=1,
            sequence_length=SEQUENCE_LENGTH,
            precision=precision,
            activation_checkpointing=self.checkpointing,
        )
        return EngineConfig(
            run="", parallel=self.parallel, train=train, optimizer=OptimizerConfig(lr=1e-3), deepspeed=SETTINGS
        )

    def planned(self, precision: Precision, hardware: Hardware, libraries: int) -> tuple[StepTime, int]:
        """What the plan says: the time of a step, and bytes of the fullest rank.

        Args:
            libraries: bytes that the run of a model of almost no size takes.
        """
        config = self.config(precision)
        stages = partition(layers_of(MODEL), self.parallel.pipeline_partition, self.dims.pipeline, self.dims.tensor)
        held = [stage.held for stage in stages]
        time = step_time(MODEL, self.parallel, config.train, self.dims, hardware, held)
        memory = [stage_memory(config, MODEL, self.dims, stage, on_host=True, libraries=libraries) for stage in stages]
        return time, max(stage.total for stage in memory)


STAGES = ParallelConfig(pipeline_parallel_size=2, pipeline_partition="uniform")
LAYOUTS = {
    "one": Layout(ParallelConfig(), ranks=1),
    "dp2_zero1": Layout(ParallelConfig(zero_stage=1)),
    "tp2": Layout(ParallelConfig(tensor_parallel_size=2)),
    "pp2": Layout(STAGES),
    "dp2_zero2": Layout(ParallelConfig(zero_stage=2)),
    "dp2_zero3": Layout(ParallelConfig(zero_stage=3)),
    "tp2_sp": Layout(ParallelConfig(tensor_parallel_size=2, sequence_parallel=True)),
    "pp2_full": Layout(STAGES, checkpointing=ActivationCheckpointing.full),
}


@dataclass(frozen=True)
class MachineRow:
    """A layout that was run.

    Attributes:
        seconds: median of a step.
        num_bytes: growth of the fullest rank.
        core_seconds: of those seconds, what a rank's core worked.
        returned_seconds: median of a step where freed memory goes back to the system, as glibc does it by itself.
    """

    name: str
    seconds: float
    num_bytes: int
    core_seconds: float
    returned_seconds: float
    hardware: Hardware
    time: StepTime
    planned_bytes: int

    @property
    def time_difference(self) -> float:
        """Predicted over measured, less one, %."""
        return 100 * (self.time.seconds / self.seconds - 1)

    @property
    def memory_difference(self) -> float:
        """Predicted over measured, less one, %."""
        return 100 * (self.planned_bytes / self.num_bytes - 1)


def row(name: str, measured: dict[str, Any], precision: Precision) -> MachineRow:
    """What was measured beside what the plan says.

    Args:
        measured: seconds, num_bytes, core_seconds, returned_seconds, libraries, and the hardware's figures.
    """
    hardware = Hardware(**measured["hardware"])
    time, planned_bytes = LAYOUTS[name].planned(precision, hardware, measured["libraries"])
    figures = {key: value for key, value in measured.items() if key not in ("hardware", "libraries")}
    return MachineRow(name, **figures, hardware=hardware, time=time, planned_bytes=planned_bytes)


def rows() -> list[MachineRow]:
    """The committed runs."""
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    precision = Precision(found["precision"])
    return [row(name, measured, precision) for name, measured in found["layouts"].items()]
