"""What a run tells: one record at a time, to the terminal, to metrics.jsonl and to Weights & Biases. Rank 0 only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakor.config.schema import LoggingConfig, WandbMode
from megakor.logs import get_logger

log = get_logger(__name__)

METRICS = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run, in the order of writing; lines that a crash cut off are left out."""
    path = run / METRICS
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # a line that a crash cut off
    return records


def next_attempt(run: Path) -> int:
    """How often the run has been started, this time included."""
    return 1 + sum(record["kind"] == "start" for record in read_metrics(run))


@dataclass(frozen=True)
class Throughput:
    """What a step cost.

    Attributes:
        seconds: wall time of the step.
        tokens: tokens of the global batch.
        flops_per_token: model FLOPs of one token, forward and backward.
        peak_tflops: matmul peak of all ranks together, TFLOP/s.
    """

    seconds: float
    tokens: int
    flops_per_token: float
    peak_tflops: float

    def record(self) -> dict[str, float]:
        """Tokens a second, model TFLOP/s of all ranks together, and MFU: those over the peak (PaLM, appendix B)."""
        tokens_per_second = self.tokens / self.seconds
        tflops = tokens_per_second * self.flops_per_token / 1e12
        return {
            "seconds": self.seconds,
            "tokens_per_second": tokens_per_second,
            "tflops": tflops,
            "mfu": tflops / self.peak_tflops,
        }


class Metrics:
    """The sinks of one attempt at a run; a context manager.

    Args:
        run: run folder.
        name: name of the run.
        config: logging section.
        resolved: the whole resolved configuration, for Weights & Biases.
        attempt: number of this start of the run.
    """

    def __init__(self, run: Path, name: str, config: LoggingConfig, resolved: Mapping[str, Any], attempt: int) -> None:
        self.attempt = attempt
        self.file = (run / METRICS).open("ab+")
        if self.file.tell() and not self._ends_with_newline():
            self.file.write(b"\n")  # close a line that a crash cut off; it reads as no record
        self.wandb = None
        if config.wandb is not WandbMode.disabled:
            import wandb  # here alone: slow to import, and one rank's business

            self.wandb = wandb.init(
                project=config.wandb_project,
                name=name,
                dir=run,
                config=dict(resolved),
                mode=config.wandb.value,
                settings=wandb.Settings(silent=True, console="off"),
            )

    def _ends_with_newline(self) -> bool:
        self.file.seek(-1, 2)
        return self.file.read(1) == b"\n"

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Write one record; floats keep every bit, and those that are not finite are null, as JSON has none."""
        values = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}
        record = {"kind": kind, "attempt": self.attempt, "step": step, **values}
        self.file.write((json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode())
        self.file.flush()
        if self.wandb is not None:
            prefix = f"{kind}/{values['set']}" if "set" in values else kind
            numbers = {f"{prefix}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
            self.wandb.log(numbers, step=step)
