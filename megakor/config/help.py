"""`megakor <verb> --help`: every key with its type, value, unit and meaning."""

from __future__ import annotations

import dataclasses
import enum
import typing
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megakor.config.verbs import Verb


def type_name(kind: Any) -> str:
    """A type as a user would write it; enumerations show their values."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "|".join(member.name for member in kind)
    if typing.get_origin(kind) is list:
        return f"list[{type_name(*typing.get_args(kind))}]"
    return str(getattr(kind, "__name__", kind)) if isinstance(kind, type) else str(kind).replace("typing.", "")


def add_rows(table: Table, schema: type, config: DictConfig, prefix: str = "") -> None:
    """One row for each key, sections one after the other."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        dotted, kind = prefix + field.name, hints[field.name]
        if dataclasses.is_dataclass(kind):
            table.add_row(Text(dotted, style="bold"), "", "", "", Text(field.metadata["help"]))
            add_rows(table, typing.cast(type, kind), config[field.name], dotted + ".")
            continue
        if OmegaConf.is_missing(config, field.name):
            value = "(required)"
        else:
            found = config[field.name]
            plain = OmegaConf.to_container(found, enum_to_str=True) if OmegaConf.is_config(found) else found
            value = "null" if plain is None else plain.name if isinstance(plain, enum.Enum) else str(plain)
        cells = (dotted, type_name(kind), value, field.metadata["unit"], field.metadata["help"])
        table.add_row(*map(Text, cells))  # plain text: brackets are not markup


def print_help(verb: Verb, overrides: list[str]) -> None:
    """Print the options of a verb, with the values that the given overrides lead to."""
    from megakor.config.compose import config_folder

    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = compose(verb.config_name, overrides=[word for word in overrides if "=" in word])
    console = Console(width=None if Console().is_terminal else 160)
    console.print(f"usage: megakor {verb.name} key=value …   [--debug] [--cfg job]\n\n{verb.summary}", highlight=False)
    folder = config_folder()
    for group in verb.groups:
        names = sorted(path.stem for path in (folder / group).glob("*.yaml"))
        names = [name for name in names if group != "experiment" or verb.owns_experiment(name)]
        console.print(f"\n{group}=NAME, one of: {', '.join(names)}", highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("key", "type", "value", "unit", "meaning"):
        table.add_column(column, overflow="fold")
    add_rows(table, verb.schema, config)
    console.print()
    console.print(table, highlight=False, markup=True)
