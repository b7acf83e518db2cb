"""What a run began with: its shards' table is kept with it, so that one that changes later is found and named."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from megakor.data.shards import Shards
from megakor.data.source import Source
from megakor.files import atomic_write

FOLDER = "shards"


def table_path(run: Path, name: str) -> Path:
    """Where a run keeps the table of a source."""
    return run / FOLDER / f"{name or 'train'}.parquet"


def keep_tables(run: Path, sources: Mapping[str, Source]) -> None:
    """Keep the tables of a run's sources, unless it has them already."""
    for name, source in sources.items():
        path = table_path(run, name)
        if not path.exists():
            with atomic_write(path) as file:
                file.write(source.manifest.shards.to_bytes())


def fingerprints(run: Path, sources: Mapping[str, Source], accept_changed: Collection[str]) -> dict[str, str]:
    """The fingerprint of each source as the run began with it.

    Raises:
        ValueError: a shard is another one since, names the file; unless it is accepted, and has as many tokens.
    """
    found = {}
    for name, source in sources.items():
        manifest, path = source.manifest, table_path(run, name)
        if path.exists():
            began = Shards.from_bytes(path.read_bytes())
            key = f"data.sources.{name}" if name else "data.train"
            _compare(f"{key}={source.folder}", name, source, began, accept_changed)
            manifest = replace(manifest, shards=began)
        found[name] = manifest.fingerprint()
    return found


def _compare(folder: str, name: str, source: Source, began: Shards, accept_changed: Collection[str]) -> None:
    now = source.manifest.shards
    if len(now) != len(began):
        raise ValueError(f"{folder}: has {len(now)} shards, and must have the {len(began)} that the run began with")
    for number in np.flatnonzero((began.digests != now.digests).any(axis=1)):
        (_, before), (file, after) = began[int(number)].file("bin"), now[int(number)].file("bin")
        accepted = f"{name}/{file}" if name else file
        if accepted not in accept_changed or before.size != after.size:
            rule = f"; data.accept_changed=[{accepted}] waives this" if before.size == after.size else ""
            raise ValueError(
                f"{folder}/{file}: has changed since the run began: sha256={after.sha256[:12]}…, {after.size} bytes, "
                f"must be {before.sha256[:12]}…, {before.size} bytes{rule}"
            )
