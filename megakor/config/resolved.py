"""A composed configuration as plain data, and as a file from which other processes start without composing it again.

dataclasses ─► dicts, lists, scalars ─► CONFIG.yaml ─► python -m megakor.<verb> --config-dir FOLDER --config-name CONFIG
"""

from __future__ import annotations

import dataclasses
import enum
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megakor.files import atomic_write


def plain(value: Any) -> Any:
    """A configuration as plain dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list) else value


def without_interpolations(value: Any) -> Any:
    """The same, with every `${` escaped: what looks like a reference is text by now."""
    if isinstance(value, dict):
        return {key: without_interpolations(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_interpolations(entry) for entry in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\${", value) if isinstance(value, str) else value


def resolved_yaml(verb: str, values: dict[str, Any]) -> str:
    """A resolved configuration as a primary file of Hydra's; other command-line keys still go on top of it.

    Args:
        verb: name of the verb's own YAML, whose schema types the file.
        values: the configuration, as `plain` gives it.
    """
    defaults = {"defaults": [f"{verb}_schema", "_self_"]}
    return OmegaConf.to_yaml(OmegaConf.create({**defaults, **without_interpolations(values)}))


def write_resolved(path: Path, verb: str, values: dict[str, Any]) -> None:
    """Write `resolved_yaml` to a file."""
    with atomic_write(path) as file:
        file.write(resolved_yaml(verb, values).encode())
