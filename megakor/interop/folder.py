"""The folder of an export or an import: written aside and renamed, so that it is there whole, or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from megakor.files import share

MARKER = "megakor_export.json"
MARKER_FORMAT = "megakor-export-1"


@contextmanager
def written_aside(out: Path, key: str = "out", replaces: bool = True) -> Iterator[Path]:
    """A folder to write into, which takes `out`'s place once the block has ended without an exception.

    Args:
        key: of the configuration, that names the folder.
        replaces: whether what is there gives way; if not, it must be an empty folder.

    Raises:
        OSError: there is no space left, or something that must stay is in its place; nothing is left of it.
    """
    aside = out.with_name(f".{out.name}.partial")
    if aside.exists():
        shutil.rmtree(aside)  # left by one that was killed
    try:
        aside.mkdir(parents=True)
        yield aside
        if replaces:
            _put_in_place(aside, out)
        else:
            os.rename(aside, out)  # an empty folder gives way
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise OSError(errno.ENOSPC, f"{key}={out}: no space left on the device; nothing was written") from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_out(out: Path) -> None:
    """Only a new folder, an empty one, or an earlier export with nothing else in it may be written."""
    if not out.exists():
        return
    rule = "must be a new folder or an earlier export of megakor"
    if not out.is_dir():
        raise ValueError(f"out={out} {rule}, and is a file")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    marker = out / MARKER
    if not marker.is_file():
        raise ValueError(f"out={out} {rule}, and holds no {MARKER}")
    try:
        record = json.loads(marker.read_text(encoding="utf-8"))
        written = set(record["files"]) if record["format"] == MARKER_FORMAT else set()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out={out} {rule}, and its {MARKER} cannot be read") from error
    if names - written:
        raise ValueError(f"out={out} {rule}, and holds {sorted(names - written)[0]}, which no export wrote")


def mark(aside: Path, figures: dict[str, Any]) -> None:
    """Write down the figures and the names of all files, by which a later export knows this one; adds `num_bytes`."""
    for path in aside.glob("*.safetensors"):  # written for the owner alone
        share(path)
    files = sorted(path.name for path in aside.iterdir())
    figures["num_bytes"] = sum((aside / name).stat().st_size for name in files)
    write_json(aside / MARKER, {"format": MARKER_FORMAT, **figures, "files": [*files, MARKER]})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _put_in_place(aside: Path, out: Path) -> None:
    """Rename; an earlier export is moved away first and removed last."""
    earlier = out.with_name(f".{out.name}.earlier")
    shutil.rmtree(earlier, ignore_errors=True)
    if out.exists():
        os.rename(out, earlier)
    os.rename(aside, out)
    shutil.rmtree(earlier, ignore_errors=True)
