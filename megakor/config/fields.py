"""How a configuration's fields are declared: default, help text and unit in one place."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from omegaconf import MISSING


def key(default: Any = MISSING, *, help: str, unit: str = "") -> Any:
    """A field with its help text and unit, which `--help` prints. Lists and dicts get a fresh copy per instance."""
    metadata = {"help": help, "unit": unit}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type, *, help: str) -> Any:
    """A nested section, built from its own defaults."""
    return field(default_factory=kind, metadata={"help": help, "unit": ""})
