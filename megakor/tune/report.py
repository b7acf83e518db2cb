"""What was tried, in print, and the winner as an experiment that `megakor launch` takes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console

from megakor.config.resolved import plain, without_interpolations
from megakor.config.schema import PretrainConfig, TuneConfig
from megakor.files import atomic_write
from megakor.plan.table import new_console, new_table
from megakor.tune.tune import FOLDER, Trial, run_keys


def write_winner(config: TuneConfig, winner: Trial) -> list[str]:
    """Write the configuration with the winner's layout; the command that starts it.

    The experiment is a file that Hydra finds by its name, `experiment/NAME.yaml` in a folder for `--config-dir`.
    """
    folder = Path(config.out) if config.out is not None else Path(config.run) / FOLDER
    name = f"{config.name}-tuned"
    layout = {"parallel": plain(winner.layout.parallel), "train": plain(winner.layout.train)}
    values = {**plain(run_keys(config, PretrainConfig)), **layout}
    head = (
        f"# @package _global_\n# {winner.seconds:.3f} s a step on {config.cluster.gpus}, the fastest that was tried.\n"
    )
    body = yaml.safe_dump(without_interpolations(values), allow_unicode=True, sort_keys=False, width=120)
    with atomic_write(folder / "experiment" / f"{name}.yaml") as file:
        file.write((head + body).encode())
    return ["megakor", "launch", "pretrain", f"--config-dir={folder}", f"experiment={name}"]


def row(trial: Trial) -> dict[str, object]:
    """A trial's figures by name."""
    return {
        "layout": trial.layout.overrides,
        "predicted_step_seconds": trial.layout.time.seconds,
        "step_seconds": trial.seconds,
        "mfu": trial.mfu,
        "predicted_memory_gib_per_gpu": trial.layout.memory.total / 2**30,
        "run": str(trial.run),
        "problem": trial.problem,
    }


def as_json(trials: Sequence[Trial], command: Sequence[str]) -> str:
    """All that was tried, fastest first, and how to go on."""
    return json.dumps({"layouts": [row(trial) for trial in trials], "command": list(command)}, ensure_ascii=False)


def print_table(trials: Sequence[Trial], command: Sequence[str]) -> None:
    """The same for people, on standard output."""
    console: Console = new_console()
    sizes = ("tensor", "pipeline", "context", "data", "ZeRO", "micro-batch")
    table = new_table((), (*sizes, "predicted s", "measured s", "MFU"))
    for name in ("recomputed", "besides"):
        table.add_column(name, no_wrap=True)
    for trial in trials:
        dims, parallel, train = trial.layout.dims, trial.layout.parallel, trial.layout.train
        besides = {
            "sequence parallel": parallel.sequence_parallel,
            "optimizer offloaded": parallel.offload_optimizer,
            "parameters offloaded": parallel.offload_parameters,
            "failed": trial.seconds is None,
        }
        numbers = (dims.tensor, dims.pipeline, dims.context, dims.data, parallel.zero_stage, train.micro_batch_size)
        table.add_row(
            *map(str, numbers), f"{trial.layout.time.seconds:.3f}",
            "" if trial.seconds is None else f"{trial.seconds:.3f}", "" if trial.mfu is None else f"{trial.mfu:.1%}",
            train.activation_checkpointing.value, ", ".join(name for name, there in besides.items() if there),
        )  # fmt: skip
    console.print(table)
    console.print(f"\nThe first is written as an experiment; go on with\n  {shlex.join(command)}", soft_wrap=True)
