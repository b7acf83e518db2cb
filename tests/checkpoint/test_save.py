"""Committed or absent: what is on the disk after a save that failed, was killed, or went well."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
import torch.distributed as dist

from megakor.checkpoint import save as saving
from megakor.checkpoint.format import LATEST, CheckpointManifest, committed
from megakor.checkpoint.reader import newest_whole, read_weights
from megakor.checkpoint.save import save_checkpoint
from megakor.train.optimizer import Piece
from tests.checkpoint.pieces import manifest, save, save_cut, snapshot, state, whole_pieces
from tests.ranks import run_ranks


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_latest_and_keep_last(tmp_path: Path, alone: None) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep_last=2)
        assert (tmp_path / "checkpoints" / LATEST).read_text() == f"step-{step:08d}"
    assert names(tmp_path) == ["latest", "step-00000015", "step-00000020"]
    save(tmp_path, 25, keep_last=0)
    assert len(committed(tmp_path)) == 3


def test_the_same_step_again_replaces_it(tmp_path: Path, alone: None) -> None:
    save(tmp_path, 5, seed=0)
    save(tmp_path, 5, seed=1)
    assert torch.equal(read_weights(tmp_path / "checkpoints/step-00000005")["embed_out.weight"],
                       state(1)["weight", "embed_out.weight"])  # fmt: skip
    assert names(tmp_path) == ["latest", "step-00000005"]


def test_a_damaged_newer_checkpoint_does_not_push_out_the_whole_ones(tmp_path: Path, alone: None) -> None:
    """Step 20 is damaged, the run goes on from 10 with another interval: what counts for keep_last is whole ones."""
    save(tmp_path, 10)
    damaged = save(tmp_path, 20)
    (damaged / "rank-00000.safetensors").write_bytes(b"")
    folder = save(tmp_path, 15, keep_last=1)
    assert folder.is_dir()
    assert newest_whole(tmp_path, contents=True) == folder


def test_latest_names_a_whole_one_after_pruning(tmp_path: Path, alone: None) -> None:
    save(tmp_path, 10)
    (save(tmp_path, 20) / "manifest.json").write_text("{")
    save(tmp_path, 15, keep_last=1)
    named = tmp_path / "checkpoints" / (tmp_path / "checkpoints" / LATEST).read_text()
    CheckpointManifest.load(named).check_contents(named)


def test_what_a_kill_left_is_cleared_by_the_next_save(tmp_path: Path, alone: None) -> None:
    save(tmp_path, 5)
    for step in (10, 7):  # of the step that comes, and of one that will not come again
        left = tmp_path / "checkpoints" / f"step-{step:08d}.writing"
        left.mkdir()
        (left / "rank-00000.safetensors").write_bytes(b"half")
    save(tmp_path, 10)
    assert names(tmp_path) == ["latest", "step-00000005", "step-00000010"]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow past `size` bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("size", [0, 8, 4096, 60_000])
def test_no_space_for_the_tensors(tmp_path: Path, alone: None, size: int) -> None:
    save(tmp_path, 5)
    before = snapshot(tmp_path)
    with file_size_limit(size), pytest.raises(OSError, match=r"saving .*step-00000010: rank 0: .*untouched"):
        save(tmp_path, 10, keep_last=1)
    assert snapshot(tmp_path) == before
    assert names(tmp_path) == ["latest", "step-00000005"]
    save(tmp_path, 10, keep_last=1)  # there is space again
    assert newest_whole(tmp_path, contents=True) == tmp_path / "checkpoints/step-00000010"


@pytest.mark.parametrize("failing", ["manifest", "sync", "rename", "latest"])
def test_no_space_at_the_end(tmp_path: Path, alone: None, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each later write fails in turn; a checkpoint that is whole stays the newest, and nothing half-written is left."""
    save(tmp_path, 5)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    real_write = saving.atomic_write

    @contextmanager
    def write(path: Path) -> Iterator[BinaryIO]:
        with real_write(path) as file:
            yield file
            if (path.name == LATEST) is (failing == "latest"):
                full()

    if failing in ("manifest", "latest"):
        monkeypatch.setattr(saving, "atomic_write", write)
    elif failing == "sync":
        monkeypatch.setattr(saving, "sync", full)
    else:
        monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 10, keep_last=1)
    monkeypatch.undo()
    found = newest_whole(tmp_path, contents=True)
    assert found is not None
    assert found.name == ("step-00000010" if failing == "latest" else "step-00000005")
    for name in names(tmp_path):
        assert name in ("latest", "step-00000005", "step-00000010"), name
    save(tmp_path, 10, keep_last=1)
    assert names(tmp_path) == ["latest", "step-00000010"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def attempt(run: Path, step: int) -> str | None:
    """What went wrong in saving, if anything."""
    try:
        save(run, step)
    except OSError as error:
        return str(error)
    return None


def test_a_full_disk(small_disk: Path, alone: None) -> None:
    """A checkpoint takes about 130 KiB: two fit, a third does not, and the last good one survives every attempt."""
    folder = save(small_disk, 5)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert 50_000 < size < 200_000, size
    step, failed = 5, 0
    while failed < 3:
        before = snapshot(small_disk)
        step += 5
        error = attempt(small_disk, step)
        if error is not None:
            failed += 1
            assert "untouched" in error
            assert "No space" in error
            assert snapshot(small_disk) == before
            assert not [name for name in names(small_disk) if name != LATEST and "." in name]
        assert step < 60
        found = newest_whole(small_disk, contents=True)
        assert found is not None
    shutil.rmtree(folder)
    assert save(small_disk, 100) == newest_whole(small_disk, contents=True)  # there is space again


def test_a_read_only_folder(small_disk: Path, alone: None) -> None:
    save(small_disk, 5)
    before = snapshot(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    error = attempt(small_disk, 10)
    assert error is not None
    assert "step-00000010" in error
    assert "Read-only file system" in error
    assert "untouched" in error
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert snapshot(small_disk) == before


def fail_on(run: Path, bad_rank: int, size: int) -> str:
    """One good checkpoint, then one that a rank has no space for. Returns what each rank was told."""
    save_cut(run, 5, seed=0)
    dist.barrier()
    before = snapshot(run)
    limit = file_size_limit(size) if dist.get_rank() == bad_rank else None
    if limit:
        limit.__enter__()
    try:
        save_cut(run, 10, seed=1)
        told = "nothing"
    except OSError as error:
        told = str(error)
    if limit:
        limit.__exit__(None, None, None)
    dist.barrier()
    assert snapshot(run) == before
    save_cut(run, 15, seed=2)
    return told


def fail_on_each(run: Path) -> list[str]:
    return [fail_on(run / f"{rank}-{size}", rank, size) for rank in (0, 1) for size in (0, 3000)]


def test_an_error_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(fail_on_each, 2, tmp_path)
    assert first == second
    for told, bad_rank in zip(first, (0, 0, 1, 1), strict=True):
        assert f"step-00000010: rank {bad_rank}: " in told
        assert "the last whole checkpoint is untouched" in told
    for run in tmp_path.iterdir():
        assert names(run) == ["latest", "step-00000005", "step-00000015"]
        assert newest_whole(run, contents=True) == run / "checkpoints/step-00000015"
        assert all(torch.equal(read_weights(committed(run)[-1])[name], value)
                   for (kind, name), value in state().items() if kind == "weight")  # fmt: skip


def pieces_missing(run: Path) -> str:
    """Rank 1 lost a piece: the checkpoint does not cover a tensor."""
    pieces = whole_pieces() if dist.get_rank() == 0 else []
    lost = [piece for piece in pieces if piece.name != "embed_out.weight"]
    half = [
        Piece(p.state, p.name, p.shape, p.shard, 0, p.values[:8], True) for p in pieces if p.name == "embed_out.weight"
    ]
    try:
        save_checkpoint(run, manifest(5), lost + half)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_checkpoint_that_would_not_be_whole_is_refused_on_all_ranks(tmp_path: Path) -> None:
    told = run_ranks(pieces_missing, 2, tmp_path, timeout=40)
    assert all("must cover its shape" in text for text in told)
    assert committed(tmp_path) == []
    assert not list(tmp_path.rglob("*.writing"))
