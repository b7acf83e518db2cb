"""From a run's folder to its ledger, in print."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from megakor.config.schema import DataConfig, TraceConfig, TrainConfig
from megakor.data.ledger import find, passages, steps
from megakor.data.skips import stretches
from megakor.data.stream import PretrainStream, pretrain_stream
from megakor.logs import progress
from megakor.tokenizer.tokenizer import Tokenizer
from megakor.train.metrics import METRICS, read_metrics

CONFIG = "config.yaml"
HISTORY = 16
"""Steps before one that say what loss was to be expected there."""

Record = dict[str, Any]


def trace(config: TraceConfig) -> None:
    """Print what is asked for.

    Raises:
        FileNotFoundError: the folder holds no run, or one of its shards' folders is gone.
        ValueError: the run is no pretraining run, or has no such step or document.
    """
    run = Path(config.run)
    data, train = load_run(run)
    if data.dataset:
        raise ValueError(f"run={run} must be trained on shards: the steps of data.dataset cannot be traced")
    stream, num_steps = pretrain_stream(data, train, Tokenizer.load(run / "tokenizer"), run), last_step(run)
    if config.document is not None:
        records = sightings(stream, config.document, num_steps)
    elif config.step is not None:
        if config.step > num_steps:
            raise ValueError(f"step={config.step} must be at most {num_steps}, the last that run={run} has logged")
        records = [asdict(passage) for passage in passages(stream, config.step)]
    else:
        records = around_spikes(stream, run, config, num_steps)
    tell(records, config.format)


def last_step(run: Path) -> int:
    """The last step that a run has taken, by its metrics."""
    return max((record["step"] for record in read_metrics(run) if record["kind"] == "train"), default=0)


def load_run(run: Path) -> tuple[DataConfig, TrainConfig]:
    """What a pretraining run reads, by the configuration that it was started with last."""
    path = run / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"run={run} must be the folder of a run: it has no {CONFIG}")
    saved: Any = OmegaConf.load(path)
    try:
        sections = [OmegaConf.merge(OmegaConf.structured(kind), saved[name])
                    for name, kind in (("data", DataConfig), ("train", TrainConfig))]  # fmt: skip
    except (OmegaConfBaseException, KeyError) as error:
        raise ValueError(f"run={run} must be a pretraining run: {str(error).splitlines()[0]}") from error
    data, train = map(OmegaConf.to_object, sections)
    assert isinstance(data, DataConfig)
    assert isinstance(train, TrainConfig)
    return data, train


def sightings(stream: PretrainStream, document: str, num_steps: int) -> list[Record]:
    """The steps that saw a document."""
    records: list[Record] = []
    for name, source in stream.sources.items():
        shards = progress(
            range(len(source.manifest.shards)), unit="shard", description=f"look through {name or 'train'}"
        )
        for shard, number in find(source, document, shards):
            prefix = source.manifest.shards[shard].prefix
            seen = steps(stream, name, shard, number, num_steps)
            records.append({"source": name, "shard": prefix, "number": number, "document": document, "steps": seen})
    if not records:
        raise ValueError(f"document={document} must be the id of a document in one of the run's shards")
    return records


def worst_steps(losses: dict[int, float], count: int) -> list[tuple[int, float]]:
    """The steps whose loss stands out most over the median of those before, and by how much; the worst first."""
    numbers = sorted(losses)
    rises = []
    for index, step in enumerate(numbers[1:], start=1):
        before = [losses[other] for other in numbers[max(0, index - HISTORY) : index]]
        rises.append((step, losses[step] - statistics.median(before)))
    return sorted(rises, key=lambda rise: (-rise[1], rise[0]))[:count]


def around_spikes(stream: PretrainStream, run: Path, config: TraceConfig, num_steps: int) -> list[Record]:
    """What was read at the worst steps, and what `data.skip` would leave them out."""
    losses = {record["step"]: record["loss"] for record in read_metrics(run) if record["kind"] == "train"}
    losses = {step: loss for step, loss in losses.items() if loss is not None}
    if len(losses) < 2:
        raise ValueError(f"run={run} must have logged at least two steps in {METRICS}")
    records = []
    for worst, rise in worst_steps(losses, config.num_spikes):
        for step in range(max(1, worst - config.around), min(num_steps, worst + config.around) + 1):
            skip = stretches(stream.rows(step - 1).positions)
            about = {"spike": worst, "loss": losses.get(step), "rise": rise if step == worst else None, "skip": skip}
            records += [{**about, **asdict(passage)} for passage in passages(stream, step)]
    return records


def tell(records: Iterable[Record], form: str) -> None:
    """Print records: as JSON, one a line, or as a table."""
    records = list(records)
    if form == "json":
        for record in records:
            print(json.dumps(record, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in records[0]:
        table.add_column(column, overflow="fold")
    for record in records:
        table.add_row(*("" if value is None else _cell(value) for value in record.values()))
    Console(width=None if Console().is_terminal else 160).print(table, markup=False)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
