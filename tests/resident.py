"""How much memory this process holds, from `/proc/self/status`."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def resident_size() -> int:
    """Bytes of memory in use now."""
    return _status("VmRSS")


def peak_resident_size() -> int:
    """The most that ever was, bytes."""
    return _status("VmHWM")


def give_back_freed_blocks() -> None:
    """Have malloc map blocks from 64 KiB on and give them back when freed: what it kept would count as in use."""
    library = ctypes.CDLL(None)
    library.mallopt(M_MMAP_THRESHOLD, 2**16)
    library.mallopt(M_ARENA_MAX, 1)


def keep_freed_blocks(below: int = 2**25) -> None:
    """Have malloc keep freed blocks below so many bytes again; by itself it comes to do so below 32 MiB."""
    library = ctypes.CDLL(None)
    library.mallopt(M_MMAP_THRESHOLD, below)
    library.mallopt(M_TRIM_THRESHOLD, 2 * below - 1)
