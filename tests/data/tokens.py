"""A tokenizer small enough to reason about: one id per UTF-8 byte. A module, so that processes can load it."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

from megakor.config.schema import ShardConfig
from megakor.data.indexed import FileRecord, IndexedWriter
from megakor.data.manifest import Manifest, write_manifest
from megakor.data.shards import ShardEntry, Shards


@dataclass
class ByteTokenizer:
    vocab_size: int = 257
    eod_id: int = 256
    seconds_per_document: float = 0.0

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"bytes {self.vocab_size} {self.eod_id}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        time.sleep(self.seconds_per_document)
        return list(text.encode())


def shard_config(inputs: list[Path], out: Path, **changes: object) -> ShardConfig:
    values = {"inputs": [str(path) for path in inputs], "tokenizer": "unused", "out": str(out), "shard_size": 1000}
    return ShardConfig(**{**values, **changes})  # type: ignore[arg-type]


def write_shards(folder: Path, shards: list[list[list[int]]], eod_id: int = 0) -> Manifest:
    """A folder of shards with exactly these documents' ids, without text and processes."""
    entries = []
    for number, documents in enumerate(shards):
        writer = IndexedWriter(folder / f"shard-{number:05d}", "u2")
        for document in documents:
            writer.add_document(document)
        files: dict[str, FileRecord] = writer.close()
        entry = ShardEntry(f"shard-{number:05d}", writer.num_tokens, len(documents), 10, 0, "", files, ["test"])
        entries.append(entry)
    manifest = Manifest("fingerprint", 60_000, eod_id, "uint16", 1000, Shards.of(entries))
    write_manifest(folder, manifest)
    return manifest
