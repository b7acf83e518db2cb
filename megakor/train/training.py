"""What a training run works with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megakor.checkpoint.format import AdapterEntry
from megakor.config.schema import EngineConfig
from megakor.data.plan import Plan
from megakor.data.stream import Batch
from megakor.train.engine import Engine, HeldoutWindows


class Stream(Protocol):
    """A source of global batches that is a pure function of the step."""

    @property
    def plan(self) -> Plan: ...

    def micro_batches(self, step: int, dp_rank: int, dp_size: int, micro_batch_size: int) -> list[Batch]: ...

    def state(self, step: int) -> dict[str, Any]: ...


class Heldout(HeldoutWindows, Protocol):
    """A named held-out set with its counts."""

    name: str
    num_tokens: int
    num_text_bytes: int


@dataclass(frozen=True)
class Training:
    """Everything that a training run works with.

    Attributes:
        config: the run.
        run: its folder.
        engine: the model in training.
        stream: the training batches.
        heldout: named held-out sets.
        tokenizer_fingerprint: of the tokenizer that the data was made with.
        first_step: optimizer steps that are done already.
        adapters: what is told of adapters in checkpoints; None: all parameters are trained.
    """

    config: EngineConfig
    run: Path
    engine: Engine
    stream: Stream
    heldout: Sequence[Heldout]
    tokenizer_fingerprint: str
    first_step: int
    adapters: AdapterEntry | None = None
