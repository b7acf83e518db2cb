"""Which checkpoints a run has: `megakor checkpoint list`. Manifests and sizes are looked at, contents are not read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from megakor.checkpoint.format import FOLDER, LATEST, MANIFEST, PREFIX, CheckpointManifest, committed, load_whole
from megakor.config.schema import CheckpointListConfig

SIZES = {"tensor_parallel_size": "tp", "pipeline_parallel_size": "pp", "context_parallel_size": "cp",
         "data_parallel_size": "dp"}  # fmt: skip
RANK_FILE = re.compile(r"rank-(\d+)\.safetensors")


@dataclass
class Entry:
    """One checkpoint.

    Attributes:
        step: None where neither the folder's name nor a manifest tells.
        damaged: why it cannot be used; None: its manifest and the sizes of its files are right.
        kept: False: it is for restarts alone. None, as all that follows, where a damaged manifest does not tell.
        num_bytes: of all files in its folder.
        layout: sizes of the layout that saved it, and `zero_stage`.
        world_size: ranks that saved it.
        validation: loss of each held-out set, nats per token.
        imported: the Hugging Face folder that its model came from; None: a run has trained it.
        latest: whether the run's `latest` names it.
    """

    step: int | None
    folder: str
    damaged: str | None
    kept: bool | None
    num_bytes: int
    num_files: int
    latest: bool
    layout: dict[str, int] | None = None
    world_size: int | None = None
    validation: dict[str, float] = field(default_factory=dict)
    imported: str | None = None


def list_checkpoints(config: CheckpointListConfig) -> None:
    """Print a run's checkpoints, the oldest first.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no checkpoints.
    """
    entries = [entry for folder in checkpoints_of(config.run) if (entry := look_at(folder))]
    if config.format == "json":
        for entry in entries:
            print(json.dumps(asdict(entry), ensure_ascii=False))
    else:
        print_table(entries)


def checkpoints_of(run: str | Path) -> list[Path]:
    """The checkpoint folders that `run=` means: all of a run's, oldest first, or the one that it is.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no checkpoints.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise FileNotFoundError(f"run={run} must be a run folder or a checkpoint folder")
    if is_checkpoint(folder):
        return [folder.absolute()]
    found = committed(folder)
    if not found:
        raise ValueError(f"run={run} must hold at least one checkpoint, in its folder {FOLDER}")
    return found


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint rather than a run, by its manifest or, where that is gone, by its place."""
    folder = folder.absolute()
    return (folder / MANIFEST).is_file() or folder in committed(folder.parent.parent)


def look_at(folder: Path) -> Entry | None:
    """A checkpoint's entry; None where it is gone by now, such as a run's old ones go."""
    damaged = manifest = None
    try:
        manifest = CheckpointManifest.load(folder)
        load_whole(folder)
    except (ValueError, OSError) as error:
        damaged = str(error)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else None
    if sizes is None:
        return None
    number = folder.name.removeprefix(PREFIX)
    step = int(number) if number.isdecimal() else manifest.step if manifest else None
    entry = Entry(step, str(folder), damaged, None, sum(sizes), len(sizes), latest_of(folder.parent) == folder.name)
    if manifest is not None:
        entry.kept, entry.validation, entry.imported = manifest.kept, manifest.validation, manifest.source
        entry.layout, entry.world_size = layout_of(manifest)
    return entry


def latest_of(folder: Path) -> str | None:
    """The name that `latest` in the folder of a run's checkpoints holds."""
    try:
        return (folder / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def layout_of(manifest: CheckpointManifest) -> tuple[dict[str, int] | None, int | None]:
    """The layout that saved a checkpoint and its number of ranks, as far as they are told.

    Where the configuration leaves data_parallel_size to the number of processes, the files count them: under ZeRO
    every rank writes one, but for models of fewer values than ranks.
    """
    parallel = manifest.train.get("parallel")
    if parallel is None:
        return None, None
    layout = {name: parallel[name] for name in (*SIZES, "zero_stage")}
    others = math.prod(layout[name] or 1 for name in SIZES if name != "data_parallel_size")
    if layout["data_parallel_size"] is None:
        ranks = [int(found[1]) + 1 for name in manifest.files if (found := RANK_FILE.fullmatch(name))]
        if layout["zero_stage"] == 0 or not ranks:
            return layout, None
        layout["data_parallel_size"] = -(-max(ranks) // others)
    return layout, others * layout["data_parallel_size"]


def print_table(entries: Sequence[Entry]) -> None:
    """The entries, a line each; and what is wrong with the damaged ones, a line each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("step", "state", "size", "files", "ranks", "layout", "validation loss", ""):
        table.add_column(column, justify="right" if column in ("step", "size", "files", "ranks") else "left")
    for entry in entries:
        table.add_row(
            str(entry.step),
            "damaged" if entry.damaged else "for restarts" if entry.kept is False else "whole",
            tqdm.format_sizeof(entry.num_bytes, "B"),
            str(entry.num_files),
            "" if entry.world_size is None else str(entry.world_size),
            f"imported from {entry.imported}" if entry.imported else spelled(entry.layout) if entry.layout else "",
            ", ".join(f"{name} {loss:.4f}" for name, loss in entry.validation.items()),
            "latest" if entry.latest else "",
        )
    Console(width=None if Console().is_terminal else 160).print(table, markup=False)
    for entry in entries:
        if entry.damaged:
            print(f"step {entry.step} is damaged: {entry.damaged}")


def spelled(layout: dict[str, Any]) -> str:
    """A layout in short, such as `tp 2 × dp 4, ZeRO-1`."""
    sizes = [f"{short} {layout[name]}" for name, short in SIZES.items() if layout[name] not in (None, 1)]
    return f"{' × '.join(sizes) or 'one rank'}, ZeRO-{layout['zero_stage']}"
