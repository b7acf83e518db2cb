"""Saving: each rank writes the pieces it owns, rank 0 the manifest, and a rename commits.

An error on any rank, such as a full disk, is raised on all of them, and the last good checkpoint stays as it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from megakor.checkpoint.format import (
    ASIDE,
    LATEST,
    MANIFEST,
    CheckpointManifest,
    FileEntry,
    TensorEntry,
    committed,
    piece_key,
    step_folder,
    step_of,
)
from megakor.files import atomic_write, sha256_of, share, sync
from megakor.parallel.together import on_first_rank, raise_together
from megakor.train.optimizer import Piece


def write_pieces(folder: Path, rank: int, pieces: Sequence[Piece]) -> tuple[str, FileEntry | None, list]:
    """Write this rank's file; returns its name, entry and what it holds. A rank that owns nothing writes none."""
    name = f"rank-{rank:05d}.safetensors"
    own = [piece for piece in pieces if piece.writes]
    if not own:
        return name, None, []
    # Clones: safetensors refuses tensors that share storage, as slices of one flat tensor do.
    save_file({key_of(piece): piece.values.detach().cpu().clone() for piece in own}, folder / name)
    share(folder / name)
    sync(folder / name)
    entry = FileEntry(size=(folder / name).stat().st_size, sha256=sha256_of(folder / name))
    held = [(f"{p.state}/{p.name}", list(p.shape), p.shard, p.offset, p.values.numel()) for p in own]
    return name, entry, held


def key_of(piece: Piece) -> str:
    """A piece's key in its file."""
    return piece_key(f"{piece.state}/{piece.name}", piece.shard.count, piece.shard.index, piece.offset)


def save_checkpoint(run: Path, manifest: CheckpointManifest, pieces: Sequence[Piece], keep_last: int) -> Path:
    """Write a checkpoint of `manifest.step` and make it the run's latest; every rank calls.

    Args:
        run: run folder, shared by all ranks.
        manifest: without files and tensors, which are filled in here.
        pieces: what this rank holds.
        keep_last: whole checkpoints to keep; 0: all.

    Raises:
        OSError: on all ranks, when any could not write; earlier checkpoints are untouched.
    """
    rank = dist.get_rank()
    folder = step_folder(run, manifest.step)
    aside = folder.with_name(folder.name + ASIDE)
    telling = (f"saving {folder}", "the last whole checkpoint is untouched")
    error: Exception | None = None
    result: tuple[str, FileEntry | None, list] = ("", None, [])
    try:
        on_first_rank(lambda: make_empty(aside))
        try:
            result = write_pieces(aside, rank, pieces)
        except (OSError, SafetensorError) as caught:
            error = caught
        raise_together(error, *telling)
        results: list[tuple[str, FileEntry | None, list]] = [result] * dist.get_world_size()
        dist.all_gather_object(results, result)
        try:
            if rank == 0:
                commit(aside, folder, manifest, results)
                prune(run, manifest.step, keep_last)
        except (OSError, ValueError) as caught:
            error = caught
        raise_together(error, *telling)
    except OSError:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def make_empty(aside: Path) -> None:
    """An empty folder to write into; what interrupted saves left is removed."""
    for leftover in aside.parent.glob(f"*{ASIDE}"):
        shutil.rmtree(leftover)
    aside.mkdir(parents=True)


def commit(aside: Path, folder: Path, manifest: CheckpointManifest, results: list) -> None:
    """Write the manifest, check every file's size, rename, and point `latest` at the folder."""
    manifest.files, manifest.tensors = {}, {}
    for name, file_entry, held in results:
        if file_entry is None:
            continue
        manifest.files[name] = file_entry
        for key, shape, shard, offset, numel in held:
            entry = manifest.tensors.setdefault(key, TensorEntry(shape, shard.dim, shard.count, []))
            entry.pieces.append((name, shard.index, offset, numel))
    manifest.check_sizes(aside)
    with atomic_write(aside / MANIFEST) as file:
        file.write(manifest.to_json().encode())
    sync(aside)
    if folder.exists():  # the same step, saved by an earlier attempt
        shutil.rmtree(folder)
    aside.rename(folder)
    sync(folder.parent)
    with atomic_write(folder.parent / LATEST) as file:
        file.write(folder.name.encode())


def prune(run: Path, step: int, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints up to the step just saved; 0 keeps all.

    Later ones, which a resume has passed over as damaged, neither count nor go.
    """
    if keep_last:
        for folder in [folder for folder in committed(run) if step_of(folder) <= step][:-keep_last]:
            shutil.rmtree(folder)
