"""Secrets of a run: environment variables that ranks get from a file of its folder, which only its owner may read.

    environment of `megakor launch` ─► RUN/launch/secrets, mode 0600 ─► environment of every rank

They never stand on a command line, where every user of a machine sees them, nor in a configuration.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

FILE = Path("launch") / "secrets"
"""Where they lie in a run folder."""


def read_secrets(run: Path) -> dict[str, str]:
    """What the file of a run holds; empty where it has none."""
    path = run / FILE
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def write_secrets(run: Path, names: Sequence[str], environment: Mapping[str, str]) -> None:
    """Write the file anew; without names there is none.

    Raises:
        ValueError: a name is not in the environment, or its value has several lines.
    """
    path = run / FILE
    path.unlink(missing_ok=True)
    for name in names:
        if name not in environment:
            raise ValueError(f"cluster.secrets={name} must be a variable of the environment here")
        if "\n" in environment[name]:
            raise ValueError(f"cluster.secrets={name} must have a value of one line")
    if names:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.writelines(f"{name}={environment[name]}\n" for name in names)


def take_secrets(run: Path, names: Sequence[str], environment: MutableMapping[str, str] = os.environ) -> None:
    """Put a run's secrets into a rank's environment; every rank calls, before anything uses them.

    Raises:
        ValueError: one is neither in the file nor in the environment.
    """
    if not names:
        return
    written = read_secrets(run)
    for name in names:
        if name in environment:
            continue
        if name not in written:
            raise ValueError(f"cluster.secrets={name} must be in {run / FILE} or in the environment of every rank")
        environment[name] = written[name]
