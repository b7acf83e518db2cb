"""`megakor import-config`: GPT-NeoX's configuration becomes an experiment of ours, and every key is accounted for.

The experiment is a YAML file that Hydra finds by its name, `experiment/<name>.yaml` in a folder for `--config-dir`.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megakor.config.compose import config_folder
from megakor.config.rules import require
from megakor.config.schema import ImportConfig
from megakor.files import atomic_write
from megakor.interop.neox_config import Row, convert, experiment_of, read_files

GROUP = "experiment"


def import_config(config: ImportConfig) -> None:
    """Print what becomes of every key, and write the experiment. After an error nothing is written.

    Raises:
        OSError: a file cannot be read, or the experiment cannot be written.
        ValueError: the files are not GPT-NeoX's, a key cannot be carried over, or the name is taken.
    """
    name = config.name or Path(config.path[0]).stem
    target = target_of(config.out, name)
    rows = convert(read_files(config.path), config.world_size)
    try:
        experiment = experiment_of(rows)
    except ValueError:
        tell(config, rows, None, [])
        raise
    later = ["data.tokenizer"] if "data" in experiment else ["data.train", "data.tokenizer"]
    write(target, name, config.path, experiment, later)
    words = [f"--config-dir={config.out}", f"{GROUP}={name}", *(f"{key}=FOLDER" for key in later)]
    tell(config, rows, target, ["megakor", "pretrain", *words])


def target_of(out: str, name: str) -> Path:
    """The file to write. ValueError where Hydra would not find it, or find another; FileExistsError where it exists."""
    rule = "be one word of a file's name, and not begin with instruct_, which is for instruction tuning"
    require("/" not in name and not name.startswith("instruct_"), "name", name, rule)
    shipped = config_folder() / GROUP / f"{name}.yaml"
    require(not shipped.exists(), "name", name, "not be that of an experiment which comes with megakor")
    target = Path(out) / GROUP / f"{name}.yaml"
    if target.exists():
        raise FileExistsError(f"{target} must not exist yet; name= and out= choose another file")
    return target


def write(target: Path, name: str, sources: Sequence[str], experiment: dict[str, Any], later: Sequence[str]) -> None:
    """Write the experiment; it is there whole, or not at all."""
    head = f"# @package _global_\n# From GPT-NeoX's {', '.join(Path(source).name for source in sources)}.\n"
    head += f"# Left to the command line: {', '.join(later)}.\n"
    body = yaml.safe_dump({"name": name, **experiment}, allow_unicode=True, sort_keys=False, width=120)
    with atomic_write(target) as file:
        file.write((head + body).encode())


def tell(config: ImportConfig, rows: Sequence[Row], target: Path | None, command: Sequence[str]) -> None:
    """Print the rows on standard output, and how to go on: as a table, or as one JSON object."""
    if config.format == "json":
        told = {"experiment": None if target is None else str(target), "command": list(command)}
        print(json.dumps({**told, "keys": [asdict(row) for row in rows]}, ensure_ascii=False, default=str))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, width in {"GPT-NeoX": 40, "value": 22, "": 8, "megakor": 40, "why": None}.items():
        table.add_column(column, overflow="fold", max_width=width)
    for row in rows:
        value = f"{_spelled(row.value)} (default)" if row.default else _spelled(row.value)
        ours = "\n".join(f"{key}={_spelled(value)}" for key, value in row.becomes.items())
        cells = (row.key, value, row.outcome, ours, row.why)
        table.add_row(*map(Text, cells))  # plain text: brackets are not markup
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    console.print(table)
    counts = Counter(row.outcome for row in rows)
    console.print("\n" + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    if target is not None:
        console.print(Text(f"{target} is written; go on with\n  {shlex.join(command)}"), soft_wrap=True)


def _spelled(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
