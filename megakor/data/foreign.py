"""Megatron data sets as they are: .bin/.idx pairs that GPT-NeoX or Megatron-LM made, which have no manifest.

What their makers do not say cannot be checked: which tokenizer they used. A pair's identity is that of its index and of
both ends of its tokens; to read a terabyte for it would take hours.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from megakor.data.indexed import FileRecord, Index, bin_path, idx_path
from megakor.data.manifest import MANIFEST_NAME, UNKNOWN, Manifest
from megakor.data.remote import RemoteFolder
from megakor.data.shards import ShardEntry, Shards
from megakor.files import sha256_of

END = 1 << 20


def is_foreign(folder: str) -> bool:
    """Whether this is the prefix of a pair, or a folder of this machine that holds pairs and no manifest."""
    if "://" in folder:
        return False
    path = Path(folder)
    if path.is_dir():
        ours = (path / MANIFEST_NAME).exists() or any(path.glob("shard-*.json"))  # whole, or not yet
        return not ours and any(path.glob("*.idx"))
    return idx_path(folder).is_file()


def foreign_manifest(path: Path) -> tuple[RemoteFolder, Manifest]:
    """The folder, and what a manifest would say, of a pair by its prefix or of all pairs of a folder.

    FileNotFoundError when an index has no tokens beside it; ValueError when it is none, or when types differ.
    """
    prefixes = sorted(found.with_suffix("") for found in path.glob("*.idx")) if path.is_dir() else [path]
    indexes = [Index(idx_path(prefix)) for prefix in prefixes]
    if len(types := {index.dtype for index in indexes}) > 1:
        raise ValueError(f"{path}: pairs must have tokens of one type, not of {sorted(map(str, types))}")
    shards = Shards.of(_entry(prefix, index) for prefix, index in zip(prefixes, indexes, strict=True))
    folder = RemoteFolder(str(prefixes[0].parent))
    return folder, Manifest(UNKNOWN, 0, 0, indexes[0].dtype.name, 0, shards)


def _entry(prefix: Path, index: Index) -> ShardEntry:
    tokens, size = bin_path(prefix), bin_path(prefix).stat().st_size
    expected = index.num_tokens * index.dtype.itemsize
    if size != expected:
        raise ValueError(f"{tokens}: size={size} must be {expected}, as its index says: truncated or changed")
    of_index = sha256_of(idx_path(prefix))
    digest = hashlib.sha256(f"{of_index} {size}".encode())
    with tokens.open("rb") as file:
        digest.update(file.read(END))
        file.seek(max(0, size - END))
        digest.update(file.read(END))
    return ShardEntry(
        prefix=prefix.name,
        num_tokens=index.num_tokens,
        num_documents=len(index.document_indices) - 1,
        num_bytes=0,
        num_replaced=0,
        text_sha256="",
        files={
            tokens.name: FileRecord(size, digest.hexdigest()),
            idx_path(prefix).name: FileRecord(idx_path(prefix).stat().st_size, of_index),
        },
        sources=[prefix.name],
    )
