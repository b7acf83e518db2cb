"""Every byte of a checkpoint against what was written: `megakor checkpoint verify`.

    manifest ─► sizes ─► SHA-256 of every file ─► the table covers every tensor ─► every header agrees with the table

All that is wrong is told, not the first alone.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megakor.checkpoint.format import PIECES, CheckpointManifest, check_step, piece_key
from megakor.checkpoint.inventory import checkpoints_of
from megakor.checkpoint.pieces import PieceIndex
from megakor.config.schema import CheckpointVerifyConfig
from megakor.files import sha256_of
from megakor.logs import Progress, progress


def verify(config: CheckpointVerifyConfig) -> None:
    """Print a line for each checkpoint that is whole, and a line for everything that is wrong with the others.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no checkpoints, or one is damaged.
    """
    folders, num_damaged = checkpoints_of(config.run), 0
    for folder in folders:
        wrong = damages(folder, config.num_threads)
        for line in wrong:
            print(f"damaged: {line}", flush=True)
        if not wrong:
            sizes = [path.stat().st_size for path in folder.iterdir()]
            print(f"whole: {folder}: {len(sizes)} files, {tqdm.format_sizeof(sum(sizes), 'B')}", flush=True)
        num_damaged += bool(wrong)
    if num_damaged:
        raise ValueError(f"run={config.run}: {num_damaged} of {len(folders)} checkpoints damaged; must be none")


def damages(folder: Path, num_threads: int) -> list[str]:
    """All that is wrong with a checkpoint, a sentence each, which names a file and what it must be."""
    try:
        manifest = CheckpointManifest.load(folder)
    except (ValueError, OSError) as error:
        return [str(error)]
    wrong = []
    try:
        check_step(folder, manifest)
    except ValueError as error:
        wrong.append(str(error))
    wrong += manifest.wrong_sizes(folder)
    sized = [name for name, entry in manifest.files.items() if size_of(folder / name) == entry.size]
    found = wrong_digests(folder, manifest, sized, num_threads)
    wrong += found.values()
    intact = [name for name in sized if name not in found]
    if PIECES in intact or PIECES not in manifest.files:
        try:
            wrong += wrong_headers(folder, manifest, manifest.pieces(folder), intact)
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def size_of(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    return path.stat().st_size if path.is_file() else None


def wrong_digests(folder: Path, manifest: CheckpointManifest, names: list[str], num_threads: int) -> dict[str, str]:
    """What is wrong with the contents of files, by name; they are read in threads, with a progress."""
    mutex = threading.Lock()
    total = sum(manifest.files[name].size for name in names)
    bar: Progress[None] = progress(total=total, unit="B", description=f"verify {folder.name}")
    with bar:

        def tell(num_bytes: int) -> None:
            with mutex:
                bar.update(num_bytes)

        with ThreadPoolExecutor(num_threads, "verify") as threads:
            answers = threads.map(lambda name: wrong_digest(folder / name, manifest.files[name].sha256, tell), names)
            return {name: answer for name, answer in zip(names, answers, strict=True) if answer}


def wrong_digest(path: Path, sha256: str, tell: Callable[[int], None]) -> str | None:
    """What is wrong with the content of one file; None: nothing."""
    try:
        if sha256_of(path, tell) != sha256:
            return f"{path}: SHA-256 differs from the manifest's; the file is damaged"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror}); every byte must be there"
    return None


def wrong_headers(folder: Path, manifest: CheckpointManifest, index: PieceIndex, names: list[str]) -> Iterator[str]:
    """What is wrong with files' own headers, which must say the same as the table of pieces."""
    rows = index.rows_of_files()
    for name in names:
        if name == PIECES:
            continue
        expected = {}
        for row in rows.get(name, ()):
            tensor, numel = index.tensors[index.tensor[row]], int(index.numel[row])
            key = piece_key(tensor, manifest.tensors[tensor].num_shards, int(index.shard[row]), int(index.offset[row]))
            expected[key] = (int(index.begin[row]), numel)
        if wrong := wrong_header(folder / name, expected):
            yield wrong


def wrong_header(path: Path, expected: dict[str, tuple[int, int]]) -> str | None:
    """What is wrong with a safetensors file's header; None: nothing.

    Args:
        expected: first byte in the file and number of elements of each piece, by its key.
    """
    rule = f"must be as {PIECES} has it"
    try:
        start, header = read_header(path)
        for key in sorted(expected.keys() | header.keys()):
            if key not in header or key not in expected:
                return f"{path}: piece {key} is {'not' if key not in header else 'only'} in its header; {rule}"
            entry, (begin, numel) = header[key], expected[key]
            bounds = [begin - start, begin - start + 4 * numel]
            if entry != {"dtype": "F32", "shape": [numel], "data_offsets": bounds}:
                return f"{path}: piece {key} is {json.dumps(entry)} in its header; {rule}, F32 [{numel}] at {bounds}"
    except (ValueError, OSError) as error:
        return f"{path}: header cannot be read ({error}); it must be that of a safetensors file"
    return None


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """The first byte after a safetensors file's header, and the header by key. ValueError when it is none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size - 8:
            raise ValueError(f"{length} bytes long")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("no JSON object")
    return 8 + length, {key: entry for key, entry in header.items() if key != "__metadata__"}
