"""Saving: each rank writes the pieces it owns, rank 0 the table of them and the manifest, and a rename commits.

    start: copies to host memory ─► a thread writes this rank's file ─► settle, once all ranks' are written: commit

Training goes on between `start` and `settle`. An error on any rank, such as a full disk, is raised on all of them, and
the last good checkpoint stays as it is.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from megakor.checkpoint.format import (
    ASIDE,
    FETCHING,
    LATEST,
    MANIFEST,
    PIECES,
    REMOVED,
    CheckpointManifest,
    FileEntry,
    TensorEntry,
    piece_key,
    step_folder,
)
from megakor.checkpoint.keep import Keep, discard, prune
from megakor.checkpoint.pieces import Held, PieceIndex
from megakor.checkpoint.tensors import write_tensors
from megakor.files import atomic_write, share, sync
from megakor.parallel.together import on_first_rank, raise_together

if TYPE_CHECKING:  # it loads the engine, and who writes weights alone has none
    from megakor.train.optimizer import Piece


class Written(NamedTuple):
    """A rank's file: its name, its entry, what it holds."""

    name: str
    entry: FileEntry
    held: list[Held]


class Saving(IntEnum):
    """How far a rank is with the checkpoint that was started last."""

    idle = 0
    writing = 1
    written = 2
    failed = 3


def write_pieces(folder: Path, rank: int, pieces: Sequence[Piece]) -> Written | None:
    """Write this rank's file; a rank that owns nothing writes none."""
    own = [piece for piece in pieces if piece.writes and piece.values.numel()]
    if not own:
        return None
    path = folder / f"rank-{rank:05d}.safetensors"
    entry, begins = write_tensors(path, [(key_of(piece), piece.values) for piece in own])
    share(path)
    held = [
        Held(f"{p.state}/{p.name}", p.shape, p.shard.dim, p.shard.count, p.shard.index, p.offset, p.values.numel(), at)
        for p, at in zip(own, begins, strict=True)
    ]
    return Written(path.name, entry, held)


def key_of(piece: Piece) -> str:
    """A piece's key in its file."""
    return piece_key(f"{piece.state}/{piece.name}", piece.shard.count, piece.shard.index, piece.offset)


@dataclass
class Started:
    """A checkpoint that is being written."""

    manifest: CheckpointManifest
    aside: Path
    folder: Path
    writing: Future[Written | None]


class Saver:
    """Saves a run's checkpoints; every rank has one, and calls its methods at the same steps.

    Host memory: a copy of what this rank saves, made at the first save and kept for the next ones; none without
    `asynchronous` (12 bytes a parameter under Adam, over the ranks that share them).

    Args:
        run: run folder, shared by all ranks.
        pieces: what this rank holds, live.
        keep: which checkpoints stay.
        asynchronous: whether training goes on while files are written.
        spared: steps that must not be removed yet; asked for on rank 0 when a checkpoint has been committed.
    """

    def __init__(
        self,
        run: Path,
        pieces: Sequence[Piece],
        keep: Keep,
        asynchronous: bool = True,
        spared: Callable[[], Collection[int]] = frozenset,
    ) -> None:
        self.run, self.pieces, self.keep, self.asynchronous = run, pieces, keep, asynchronous
        self.spared = spared
        self._copies: list[Piece] = []
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._started: Started | None = None
        self._pruning: Future[list[Path]] | None = None  # rank 0's
        self._spared_at: int | None = None  # step whose commit left others that go by the rule

    @property
    def state(self) -> Saving:
        """Of this rank. Ranks tell each other at every step boundary, and call `settle` when none is writing."""
        if self._started is None:
            return Saving.idle
        if not self._started.writing.done():
            return Saving.writing
        return Saving.failed if self._started.writing.exception() else Saving.written

    def start(self, manifest: CheckpointManifest) -> Path | None:
        """Begin to save; returns when the live values may change: its folder, if it is whole by then.

        An earlier save must have been settled.

        Args:
            manifest: without files and tensors, which are filled in.

        Raises:
            OSError: on all ranks, when any could not write.
        """
        assert self._started is None, "the checkpoint before must be settled"
        folder = step_folder(self.run, manifest.step)
        aside = folder.with_name(folder.name + ASIDE)
        try:
            on_first_rank(lambda: self._make_empty(aside))
        except OSError as error:
            raise OSError(f"{telling(folder)[0]}: {error}; {telling(folder)[1]}") from error
        pieces = self._copy() if self.asynchronous else self.pieces
        writing = self._writer.submit(write_pieces, aside, dist.get_rank(), pieces)
        self._started = Started(manifest, aside, folder, writing)
        return None if self.asynchronous else self.settle()

    def settle(self) -> Path | None:
        """Wait until all ranks have written, and make the checkpoint the run's latest. Its folder, if one was started.

        Raises:
            OSError: on all ranks, when any could not write; earlier checkpoints are untouched.
        """
        started, self._started = self._started, None
        if started is None:
            return None
        rank, written = dist.get_rank(), None
        error: Exception | None = None
        try:
            try:
                written = started.writing.result()
            except OSError as caught:
                error = caught
            raise_together(error, *telling(started.folder))
            files: list[Written | None] | None = [None] * dist.get_world_size() if rank == 0 else None
            dist.gather_object(written, files)
            try:
                if files is not None:
                    commit(started.aside, started.folder, started.manifest, [file for file in files if file])
                    self._pruned()
                    self._prune(started.manifest.step)
                    if not self.asynchronous:
                        self._pruned()
            except (OSError, ValueError) as caught:
                error = caught
            raise_together(error, *telling(started.folder))
        except OSError:
            if rank == 0:
                shutil.rmtree(started.aside, ignore_errors=True)
            raise
        return started.folder

    def finish(self) -> None:
        """Settle, and wait until old checkpoints are gone; every rank calls, at the end. OSError as `settle`."""
        self.settle()
        error = None
        try:
            self._pruned()
            if self._spared_at is not None:
                self._prune(self._spared_at)
                self._pruned()
        except OSError as caught:
            error = caught
        raise_together(error, f"removing old checkpoints of {self.run}", "the newest one is whole")

    def close(self) -> None:
        """Wait for this rank's thread. What is not settled is not committed."""
        self._writer.shutdown(wait=True)

    def _prune(self, step: int) -> None:
        """Begin to remove what goes by the rule, now that a checkpoint is there; what is spared goes another time."""
        spared = frozenset(self.spared())
        self._spared_at = step if spared else None
        self._pruning = self._writer.submit(prune, self.run, step, self.keep, spared)

    def _make_empty(self, aside: Path) -> None:
        """As `make_empty`, when what is being removed has gone."""
        self._pruned()
        make_empty(aside)

    def _pruned(self) -> None:
        """Wait until old checkpoints are gone, or raise what kept them."""
        pruning, self._pruning = self._pruning, None
        if pruning is not None:
            pruning.result()

    @torch.no_grad()
    def _copy(self) -> list[Piece]:
        """The pieces that this rank writes, on the host."""
        own = [piece for piece in self.pieces if piece.writes and piece.values.numel()]
        if not self._copies:
            pinned = bool(own) and not own[0].values.is_cpu
            self._copies = [
                replace(piece, values=torch.empty(piece.values.shape, dtype=torch.float32, pin_memory=pinned))
                for piece in own
            ]
        for piece, copy in zip(own, self._copies, strict=True):
            copy.values.copy_(piece.values, non_blocking=True)
        for device in {piece.values.device for piece in own if not piece.values.is_cpu}:
            torch.get_device_module(device).synchronize(device)
        return self._copies


def telling(folder: Path) -> tuple[str, str]:
    """What an error says was being done, and what follows from it."""
    return f"saving {folder}", "the last whole checkpoint is untouched"


def save_checkpoint(run: Path, manifest: CheckpointManifest, pieces: Sequence[Piece], keep: Keep | None = None) -> Path:
    """Write a checkpoint of `manifest.step` and make it the run's latest; every rank calls. As `Saver`, at once."""
    saver = Saver(run, pieces, keep or Keep(), asynchronous=False)
    saver.start(manifest)
    saver.close()
    return step_folder(run, manifest.step)


def make_empty(aside: Path) -> None:
    """An empty folder to write into; what interrupted saves left is removed."""
    for suffix in (ASIDE, FETCHING, REMOVED):
        for leftover in aside.parent.glob(f"*{suffix}"):
            shutil.rmtree(leftover)
    aside.mkdir(parents=True)


def commit(aside: Path, folder: Path, manifest: CheckpointManifest, files: Sequence[Written]) -> None:
    """Write table and manifest, check every file, rename, and point `latest` at the folder."""
    table = PieceIndex.of({file.name: file.held for file in files}).to_bytes()
    manifest.files = {file.name: file.entry for file in files}
    manifest.files[PIECES] = FileEntry(len(table), hashlib.sha256(table).hexdigest())
    manifest.tensors = {
        held.tensor: TensorEntry(list(held.shape), held.shard_dim, held.num_shards)
        for file in files
        for held in file.held
    }
    with atomic_write(aside / PIECES) as stream:
        stream.write(table)
    manifest.check_sizes(aside)
    with atomic_write(aside / MANIFEST) as stream:
        stream.write(manifest.to_json().encode())
    put_in_place(aside, folder)


def put_in_place(aside: Path, folder: Path) -> None:
    """Commit a checkpoint that is whole: rename its folder, and point `latest` at it."""
    sync(aside)
    if folder.exists():  # the same step, saved by an earlier attempt
        discard(folder)
    aside.rename(folder)
    sync(folder.parent)
    with atomic_write(folder.parent / LATEST) as stream:
        stream.write(folder.name.encode())
