"""The manifest makes a folder of shards one data set: what is in it, which tokenizer made it, and how to check it.

`manifest.json` is written last, so a folder that has one is whole. `load_manifest` compares the sizes of all files,
which is cheap and finds truncation; `verify_manifest` reads everything and compares SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from megakor.data.indexed import FileRecord
from megakor.files import atomic_write, sha256_of

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class ShardEntry:
    """One shard. Counts of text are of its normal form, which the tokenizer sees."""

    prefix: str  # of its files, relative to the manifest's folder
    num_tokens: int  # end-of-document tokens included
    num_documents: int
    num_bytes: int  # UTF-8 bytes of the text
    num_replaced: int  # characters U+2581 that the normal form replaced
    text_sha256: str  # of the SHA-256 of each document's text as it was read, in order
    files: dict[str, FileRecord]
    sources: list[str]  # of its documents; the first hundred


@dataclass(frozen=True)
class Manifest:
    """All shards of a folder, in the stream's order, and the tokenizer that made them."""

    tokenizer_fingerprint: str
    vocab_size: int
    eod_id: int
    dtype: str
    shard_size: int
    shards: list[ShardEntry] = field(default_factory=list)
    version: int = MANIFEST_VERSION

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)

    @property
    def num_text_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def sources(self) -> list[str]:
        return sorted({source for shard in self.shards for source in shard.sources})

    def fingerprint(self) -> str:
        """SHA-256 over what a run's batches depend on: tokenizer, type and the tokens themselves, in their order."""
        identity = [self.version, self.tokenizer_fingerprint, self.vocab_size, self.eod_id, self.dtype]
        tokens = [[shard.num_tokens, shard.files[_bin_name(shard.prefix)].sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps([identity, tokens], separators=(",", ":")).encode()).hexdigest()

    def check_tokenizer(self, fingerprint: str, key: str) -> None:
        """ValueError, naming the configuration key, unless the tokenizer with this fingerprint made the shards."""
        if fingerprint != self.tokenizer_fingerprint:
            raise ValueError(
                f"{key}: the tokenizer's fingerprint={fingerprint[:12]}… must be that of the tokenizer that made the "
                f"shards, {self.tokenizer_fingerprint[:12]}…"
            )

    def as_dict(self) -> dict[str, Any]:
        totals = {name: getattr(self, name) for name in ("num_tokens", "num_documents", "num_text_bytes", "sources")}
        return {**asdict(self), **totals}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / MANIFEST_NAME, manifest.as_dict())


def load_manifest(folder: str | Path) -> Manifest:
    """Read a folder's manifest and compare the sizes of its files.

    FileNotFoundError when the folder holds no manifest; ValueError naming file, value and rule when the manifest is
    malformed, names a file outside its folder, or when a shard is missing or has another size.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; `megakor shard out={folder}` writes it once all shards are whole")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["version"] != MANIFEST_VERSION:
            raise ValueError(f"version={raw['version']!r} must be {MANIFEST_VERSION}")
        manifest = Manifest(
            tokenizer_fingerprint=str(raw["tokenizer_fingerprint"]),
            vocab_size=int(raw["vocab_size"]),
            eod_id=int(raw["eod_id"]),
            dtype=np.dtype(raw["dtype"]).name,
            shard_size=int(raw["shard_size"]),
            shards=[shard_entry(shard) for shard in raw["shards"]],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: is no manifest of shards: {error!r}") from error
    for shard in manifest.shards:
        check_shard(folder, shard, manifest.dtype)
    return manifest


def verify_manifest(folder: str | Path) -> Manifest:
    """As `load_manifest`, and compare every file's SHA-256 with what was written."""
    manifest = load_manifest(folder)
    for shard in manifest.shards:
        for name, record in shard.files.items():
            path = Path(folder) / name
            actual = sha256_of(path)
            if actual != record.sha256:
                raise ValueError(f"{path}: sha256={actual} must be {record.sha256}, as the manifest says: changed")
    return manifest


def shard_entry(raw: Mapping[str, Any]) -> ShardEntry:
    """A shard's entry from its JSON; ValueError when it names a file outside its folder."""
    files = {str(name): FileRecord(int(file["size"]), str(file["sha256"])) for name, file in raw["files"].items()}
    prefix = str(raw["prefix"])
    for name in (prefix, *files):
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or not inside.name:
            raise ValueError(f"name={name!r} must stay inside the manifest's folder")
    if _bin_name(prefix) not in files or f"{prefix}.idx" not in files:
        raise ValueError(f"shard {prefix!r} must list its .bin and .idx")
    return ShardEntry(
        prefix=prefix,
        num_tokens=int(raw["num_tokens"]),
        num_documents=int(raw["num_documents"]),
        num_bytes=int(raw["num_bytes"]),
        num_replaced=int(raw["num_replaced"]),
        text_sha256=str(raw["text_sha256"]),
        files=files,
        sources=[str(source) for source in raw["sources"]],
    )


def check_shard(folder: Path, shard: ShardEntry, dtype: str) -> None:
    """ValueError unless the shard's files are there with the sizes that its entry and its token count demand."""
    for name, record in shard.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != record.size:
            found = "missing" if size is None else f"size={size}"
            raise ValueError(
                f"{path}: {found}, must be {record.size} bytes, as the manifest says: truncated or changed"
            )
    size, expected = shard.files[_bin_name(shard.prefix)].size, shard.num_tokens * np.dtype(dtype).itemsize
    if size != expected:
        raise ValueError(f"{folder / shard.prefix}.bin: size={size} must be {expected} for {shard.num_tokens} tokens")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    with atomic_write(path) as stream:
        stream.write((json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())


def _bin_name(prefix: str) -> str:
    return f"{prefix}.bin"
