"""Files that are whole or absent: written aside, synced, then renamed into place; their SHA-256; room for them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

BLOCK = 1 << 20


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file to write bytes to, at `path` once the block has ended without an exception; else nothing changes there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share(path: Path) -> None:
    """Give a file the mode that the process's umask allows; safetensors makes its files readable to the owner only."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def sha256_of(path: Path, tell: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Args:
        tell: called with the number of bytes of every block that has been read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            if tell is not None:
                tell(len(block))
    return digest.hexdigest()


def check_new(key: str, folder: Path) -> None:
    """ValueError unless a folder that is to be written is not there yet, or empty; `key` is the one that names it."""
    rule = f"{key}={folder} must be a new or an empty folder"
    if folder.is_dir():
        for name in sorted(path.name for path in folder.iterdir()):
            raise ValueError(f"{rule}, and holds {name}")
    elif folder.exists():
        raise ValueError(f"{rule}, and is a file")


def check_space(key: str, path: Path, num_bytes: int) -> None:
    """OSError unless the disk on which `path` is to be written has room for tensors of so many bytes."""
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise OSError(errno.ENOSPC, f"{key}={path}: the tensors need {num_bytes:,} bytes, and {free:,} are free")
