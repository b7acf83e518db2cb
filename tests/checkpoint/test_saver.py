"""Saving beside training: what is saved is what was live at the start, and errors reach everyone."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megakor.checkpoint import save as saving
from megakor.checkpoint.format import LATEST, committed
from megakor.checkpoint.keep import Keep
from megakor.checkpoint.reader import CheckpointValues, newest_whole
from megakor.checkpoint.save import Saver, Saving
from megakor.checkpoint.tensors import write_tensors
from megakor.files import sha256_of
from tests.checkpoint.dying import die_at
from tests.checkpoint.pieces import cut, manifest, state, whole_pieces
from tests.checkpoint.test_save import file_size_limit
from tests.ranks import run_ranks


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits for this."""
    go, real = threading.Event(), saving.write_tensors

    def write(path: Path, tensors: Any) -> Any:
        assert go.wait(30)
        return real(path, tensors)

    monkeypatch.setattr(saving, "write_tensors", write)
    return go


def check(folder: Path) -> None:
    """The checkpoint holds the state."""
    with CheckpointValues(folder) as values:
        for (kind, name), tensor in state().items():
            assert torch.equal(values.read(kind, name, 0, tensor.numel()), tensor.view(-1))


def test_what_was_live_at_the_start_is_saved(tmp_path: Path, alone: None, slow: threading.Event) -> None:
    pieces = whole_pieces()
    saver = Saver(tmp_path, pieces, Keep())
    assert saver.state is Saving.idle
    assert saver.start(manifest(5)) is None
    assert saver.state is Saving.writing
    assert committed(tmp_path) == []
    for piece in pieces:
        piece.values.add_(1)  # training goes on
    slow.set()
    while saver.state is Saving.writing:
        time.sleep(0.01)
    assert saver.state is Saving.written
    assert committed(tmp_path) == []  # not before all ranks say so
    assert saver.settle() == tmp_path / "checkpoints/step-00000005"
    assert saver.state is Saving.idle
    assert saver.settle() is None
    check(tmp_path / "checkpoints/step-00000005")
    for piece in pieces:
        piece.values.sub_(1)
    saver.start(manifest(10))
    saver.settle()
    saver.finish()
    saver.close()
    assert (tmp_path / "checkpoints" / LATEST).read_text() == "step-00000010"


def test_an_error_in_the_thread_reaches_the_user(tmp_path: Path, alone: None) -> None:
    saver = Saver(tmp_path, whole_pieces(), Keep())
    saver.start(manifest(5))
    saver.settle()
    with file_size_limit(4096):
        saver.start(manifest(10))
        while saver.state is Saving.writing:
            time.sleep(0.01)
        assert saver.state is Saving.failed
        with pytest.raises(OSError, match=r"saving .*step-00000010: rank 0: OSError: .*; the last whole .* untouched"):
            saver.settle()
    assert newest_whole(tmp_path, contents=True) == tmp_path / "checkpoints/step-00000005"
    assert not list(tmp_path.rglob("*.writing"))
    saver.start(manifest(10))
    saver.finish()
    saver.close()
    check(tmp_path / "checkpoints/step-00000010")


def test_what_keeps_old_ones_reaches_the_user(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> list[Path]:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(saving, "prune", refuse)
    saver = Saver(tmp_path, whole_pieces(), Keep())
    saver.start(manifest(5))
    with pytest.raises(OSError, match=r"removing old checkpoints of .*: rank 0: .*Read-only .*the newest one is whole"):
        saver.finish()
    saver.close()
    check(tmp_path / "checkpoints/step-00000005")


def save_beside(run: Path) -> list[str]:
    """Two ranks save beside each other; then rank 1 has no space, in its thread; then it goes on."""
    saver, told = Saver(run, cut(dist.get_rank(), 2, seed=3), Keep()), []
    for step in (5, 10, 15):
        limit = file_size_limit(2000) if step == 10 and dist.get_rank() == 1 else None
        if limit:
            limit.__enter__()
        saver.start(manifest(step))
        try:
            told.append(str(saver.settle()))
        except OSError as error:
            told.append(str(error))
        if limit:
            limit.__exit__(None, None, None)
    saver.finish()
    saver.close()
    return told


def test_ranks_settle_together(tmp_path: Path) -> None:
    first, second = run_ranks(save_beside, 2, tmp_path)
    assert first == second
    assert "step-00000010: rank 1: OSError" in first[1]
    assert [folder.name for folder in committed(tmp_path)] == ["step-00000005", "step-00000015"]
    for folder in committed(tmp_path):
        check(folder)


def save_and_die(run: Path, last: int) -> int:
    """Save step 5, then 10, and die at operation `last` of the second save; as `die_at`."""
    savers: list[Saver] = []

    def before() -> None:
        savers.append(Saver(run, whole_pieces(), Keep(last=1)))
        savers[0].start(manifest(5))
        savers[0].settle()

    def work() -> None:
        savers[0].start(manifest(10))
        savers[0].finish()

    return die_at(last, before, work)


def test_killed_at_every_operation(tmp_path: Path) -> None:
    """Whatever was the last thing done to a file, the newest checkpoint is whole, and it is one of the two."""
    total = save_and_die(tmp_path / "whole", 1 << 30)
    assert total > 20
    seen = set()
    for last in range(total):
        run = tmp_path / str(last)
        assert save_and_die(run, last) == 0
        newest = newest_whole(run, contents=True)
        assert newest is not None, last
        check(newest)
        seen.add(newest.name)
    assert seen == {"step-00000005", "step-00000010"}


def test_the_files_are_safetensors(tmp_path: Path) -> None:
    """Read by the library, byte for byte, and digested as they were written."""
    tensors = [("가@0", torch.randn(1000)), ("b#1@3", torch.randn(10, 2)[:, 0]), ("c", torch.zeros(1))]
    entry, begins = write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[key], values) for key, values in tensors)
    assert found.keys() == dict(tensors).keys()
    content = (tmp_path / "x.safetensors").read_bytes()
    assert (entry.size, entry.sha256) == (len(content), sha256_of(tmp_path / "x.safetensors"))
    for begin, (_, values) in zip(begins, tensors, strict=True):
        assert content[begin : begin + 4 * len(values)] == values.contiguous().numpy().tobytes()


def test_large_tensors_go_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megakor.checkpoint.tensors.BLOCK", 100)
    values = torch.randn(12_345)
    entry, _ = write_tensors(tmp_path / "x", [("a", values)])
    assert entry.sha256 == sha256_of(tmp_path / "x")
    assert torch.equal(load_file(tmp_path / "x")["a"], values)
