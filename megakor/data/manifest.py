"""The manifest makes a folder of shards one data set: what is in it, which tokenizer made it, and how to check it.

`manifest.json` says what all shards share, their totals, and the SHA-256 of `shards.parquet`, which has their entries.
It is written last, so a folder that has one is whole. Loading it costs the same few reads for any number of shards;
`check_files` compares the sizes of all files by one listing, `verify_manifest` reads everything and compares SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megakor.data.remote import RemoteFolder
from megakor.data.shards import ShardEntry, Shards
from megakor.files import atomic_write, sha256_of
from megakor.logs import get_logger

MANIFEST_NAME = "manifest.json"
TABLE_NAME = "shards.parquet"
MANIFEST_VERSION = 2
UNKNOWN = ""
"""Fingerprint of the tokenizer of shards of other makers, who do not tell it."""

log = get_logger(__name__)


@dataclass(frozen=True)
class Manifest:
    """All shards of a folder, in their order, and the tokenizer that made them."""

    tokenizer_fingerprint: str
    vocab_size: int
    eod_id: int
    dtype: str
    shard_size: int
    shards: Shards
    version: int = MANIFEST_VERSION

    @property
    def num_tokens(self) -> int:
        return self.shards.total("num_tokens")

    @property
    def num_documents(self) -> int:
        return self.shards.total("num_documents")

    @property
    def num_text_bytes(self) -> int:
        return self.shards.total("num_bytes")

    @property
    def sources(self) -> list[str]:
        return self.shards.sources

    def job(self) -> dict[str, Any]:
        """What all shards share."""
        return {name: value for name, value in vars(self).items() if name != "shards"}

    def fingerprint(self) -> str:
        """SHA-256 over what a run's batches depend on: tokenizer, type and the tokens themselves, in their order."""
        identity = [self.version, self.tokenizer_fingerprint, self.vocab_size, self.eod_id, self.dtype]
        digest = hashlib.sha256(json.dumps(identity, separators=(",", ":")).encode())
        digest.update(self.shards.num_tokens.astype("<i8").tobytes())
        digest.update(self.shards.digests.tobytes())
        return digest.hexdigest()

    def check_tokenizer(self, fingerprint: str, key: str) -> None:
        """ValueError, naming the configuration key, unless the tokenizer with this fingerprint made the shards."""
        if self.tokenizer_fingerprint == UNKNOWN:
            log.warning("%s: who made the shards has not said with which tokenizer; it must be this one", key)
        elif fingerprint != self.tokenizer_fingerprint:
            raise ValueError(
                f"{key}: the tokenizer's fingerprint={fingerprint[:12]}… must be that of the tokenizer that made the "
                f"shards, {self.tokenizer_fingerprint[:12]}…"
            )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the table, then the manifest that names it."""
    table = manifest.shards.to_bytes()
    with atomic_write(folder / TABLE_NAME) as stream:
        stream.write(table)
    totals = {name: manifest.shards.total(name) for name in ("num_tokens", "num_documents")}
    named = {"name": TABLE_NAME, "num_shards": len(manifest.shards), "sha256": hashlib.sha256(table).hexdigest()}
    told = {**manifest.job(), **totals, "num_text_bytes": manifest.num_text_bytes, "sources": manifest.sources}
    write_json(folder / MANIFEST_NAME, {**told, "table": named})


def load_manifest(folder: RemoteFolder) -> Manifest:
    """Read a folder's manifest and the table of its shards.

    FileNotFoundError when the folder holds no manifest; ValueError naming file, value and rule when it is malformed,
    does not belong to its table, or names a file outside its folder.
    """
    path = f"{folder}/{MANIFEST_NAME}"
    try:
        content = folder.read(MANIFEST_NAME)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: not there; `megakor shard out={folder}` writes it once all shards are whole"
        ) from error
    try:
        raw = json.loads(content)
        if raw["version"] != MANIFEST_VERSION:
            raise ValueError(f"version={raw['version']!r} must be {MANIFEST_VERSION}; `megakor shard` makes it anew")
        table = folder.read(TABLE_NAME)
        found, expected = hashlib.sha256(table).hexdigest(), raw["table"]["sha256"]
        if found != expected:
            raise ValueError(f"{TABLE_NAME}: sha256={found} must be {expected}: changed")
        manifest = Manifest(
            tokenizer_fingerprint=str(raw["tokenizer_fingerprint"]),
            vocab_size=int(raw["vocab_size"]),
            eod_id=int(raw["eod_id"]),
            dtype=np.dtype(raw["dtype"]).name,
            shard_size=int(raw["shard_size"]),
            shards=Shards.from_bytes(table),
        )
        _check_token_counts(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, FileNotFoundError) as error:
        raise ValueError(f"{path}: is no manifest of shards with its {TABLE_NAME}: {error!r}") from error
    return manifest


def check_files(folder: RemoteFolder, manifest: Manifest) -> None:
    """ValueError unless every shard's files are there in the size that the manifest says; one listing."""
    sizes = folder.sizes()
    for name, size in manifest.shards.file_sizes():
        check_size(f"{folder}/{name}", sizes.get(name), size)


def verify_manifest(folder: Path) -> Manifest:
    """As `load_manifest` and `check_files`, and compare every file's SHA-256 with what was written."""
    local = RemoteFolder(str(folder))
    manifest = load_manifest(local)
    check_files(local, manifest)
    for shard in manifest.shards:
        for name, record in shard.files.items():
            actual = sha256_of(folder / name)
            if actual != record.sha256:
                raise ValueError(
                    f"{folder / name}: sha256={actual} must be {record.sha256}, as the manifest says: changed"
                )
    return manifest


def check_shard(folder: str, shard: ShardEntry, sizes: dict[str, int]) -> None:
    """ValueError unless the shard's files are among those of a folder, by their sizes in bytes."""
    for name, record in shard.files.items():
        check_size(f"{folder}/{name}", sizes.get(name), record.size)


def check_size(path: str, size: int | None, expected: int) -> None:
    """ValueError unless a file has the size that its manifest says; None: it is not there."""
    if size != expected:
        found = "missing" if size is None else f"size={size}"
        raise ValueError(f"{path}: {found}, must be {expected} bytes, as the manifest says: truncated or changed")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    with atomic_write(path) as stream:
        stream.write((json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())


def _check_token_counts(manifest: Manifest) -> None:
    size, expected = manifest.shards.bin_sizes, manifest.shards.num_tokens * np.dtype(manifest.dtype).itemsize
    wrong = np.flatnonzero(size != expected)
    if len(wrong):
        shard = manifest.shards[int(wrong[0])]
        raise ValueError(
            f"{shard.prefix}.bin: size={size[wrong[0]]} must be {expected[wrong[0]]} for {shard.num_tokens} tokens"
        )
