"""The safetensors files of a checkpoint: written in one pass with their SHA-256, read by the byte.

The safetensors library writes from a copy of all tensors in memory and is read again for the digest; its reader maps
whole files. A rank's file here holds what the rank owns of the model, and neither the copy nor the pages are wanted.
Format: https://github.com/safetensors/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from megakor.checkpoint.format import FileEntry
from megakor.files import sync

BLOCK = 16 << 20
CHUNK = 1 << 20
"""Elements that are read at a time: where they do not go to their place at once, 4 MiB of host memory, and as much
again where shards are cut otherwise. The second copy then finds them in the processor's cache."""
ALIGNMENT = 8
MOST_BEHIND = 64
"""Blocks that digesting may lag behind: on an accelerator's host they are copies, 1 GiB at most."""


def write_tensors(path: Path, tensors: Sequence[tuple[str, torch.Tensor]]) -> tuple[FileEntry, list[int]]:
    """Write 1-D fp32 tensors and sync the file: its entry, and the first byte of each tensor."""
    return write_values(path, [(key, len(values)) for key, values in tensors], (values for _, values in tensors))


def write_values(
    path: Path, sizes: Sequence[tuple[str, int]], tensors: Iterable[torch.Tensor], most_behind: int = MOST_BEHIND
) -> tuple[FileEntry, list[int]]:
    """`write_tensors` of tensors that are taken one after the other, of the elements that `sizes` tells by key.

    Blocks are digested beside writing and syncing; all of that leaves the interpreter to other threads.

    Args:
        most_behind: blocks that digesting may lag behind; they stay in memory till then.
    """
    header: dict[str, dict[str, object]] = {}
    position = 0
    for key, numel in sizes:
        assert key not in header, key
        header[key] = {"dtype": "F32", "shape": [numel], "data_offsets": [position, position + 4 * numel]}
        position += 4 * numel
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as digester:
        file.write(head)
        digested: deque[Future[None]] = deque()
        for (key, numel), values in zip(sizes, tensors, strict=True):
            assert values.shape == (numel,), key
            content = bytes_of(values.detach().cpu().contiguous())
            for start in range(0, len(content), BLOCK):
                block = content[start : start + BLOCK]
                digested.append(digester.submit(digest.update, block))
                while block:  # a full disk writes a part before it fails
                    block = block[file.write(block) :]
                if len(digested) > most_behind:
                    digested.popleft().result()
        os.fsync(file.fileno())
        for last in digested:
            last.result()
    sync(path.parent)
    begins = [len(head) + entry["data_offsets"][0] for entry in header.values()]  # type: ignore[index]
    return FileEntry(len(head) + position, digest.hexdigest()), begins


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host, without a copy."""
    return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]


class OpenFiles:
    """Files of a folder that are read by the byte, by any number of threads; closed together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mutex = threading.Lock()
        self._descriptors: dict[str, int] = {}

    def read(self, name: str, begin: int, out: torch.Tensor) -> None:
        """Fill a contiguous 1-D tensor on the host with the bytes from `begin` on. OSError when the file ends early."""
        content = bytes_of(out)
        with self._mutex:
            if name not in self._descriptors:
                self._descriptors[name] = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
            descriptor = self._descriptors[name]
        while content:
            count = os.preadv(descriptor, [content], begin)
            if not count:
                raise OSError(f"{self.folder / name}: ends before byte {begin + len(content)}")
            content, begin = content[count:], begin + count

    def close(self) -> None:
        """No thread may be reading."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def allow_open_files(count: int) -> None:
    """Let this process open so many files besides those it may open now, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + count, hard), hard))
