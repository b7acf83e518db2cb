"""Tensors that were saved in shards: any part of any other shard reads as the same part of the whole."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megakor.checkpoint.format import MANIFEST, PIECES, CheckpointManifest, TensorEntry
from megakor.checkpoint.reader import CheckpointValues, load_model, newest_whole, read_weights
from megakor.checkpoint.save import commit, write_pieces
from megakor.checkpoint.tensors import OpenFiles
from megakor.model.specs import WHOLE, Shard, parameter_specs
from megakor.train.optimizer import Piece
from tests.checkpoint.pieces import MODEL, edit, manifest, retable, sharded_pieces, state

KEY = "weight/layer"


def save_pieces(run: Path, step: int, ranks: list[list[Piece]]) -> Path:
    """A checkpoint of the pieces of several ranks, written by one process."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    aside = folder.with_name("aside")
    aside.mkdir(parents=True)
    written = [write_pieces(aside, rank, pieces) for rank, pieces in enumerate(ranks)]
    commit(aside, folder, manifest(step), [file for file in written if file])
    return folder


@st.composite
def shards_of(draw: st.DrawFn, shape: tuple[int, ...]) -> Shard:
    """A legal cut of a tensor of this shape, and one of its shards."""
    dim = draw(st.integers(0, len(shape) - 1))
    count = draw(st.sampled_from([count for count in range(1, shape[dim] + 1) if shape[dim] % count == 0]))
    return Shard(dim, draw(st.integers(0, count - 1)), count)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_range_of_any_shard_of_any_cut(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=3), label="shape"))
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    saved, num_ranks = data.draw(shards_of(shape), label="saved"), data.draw(st.integers(1, 4))
    ranks: list[list[Piece]] = [[] for _ in range(num_ranks)]
    for index in range(saved.count):
        shard = Shard(saved.dim, index, saved.count)
        part = shard.of(whole).flatten()
        borders = [0, *sorted(data.draw(st.sets(st.integers(1, part.numel()), max_size=3))), part.numel()]
        for start, stop in itertools.pairwise(borders):
            if start < stop:
                rank = data.draw(st.integers(0, num_ranks - 1))
                ranks[rank].append(Piece("weight", "layer", shape, shard, start, part[start:stop], True))
    wanted = data.draw(st.just(WHOLE) | shards_of(shape), label="wanted")
    expected = wanted.of(whole).flatten()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_pieces(Path(folder), 1, ranks)
        with CheckpointValues(checkpoint) as values:
            for _ in range(5):
                start = data.draw(st.integers(0, expected.numel()))
                stop = data.draw(st.integers(start, expected.numel()))
                assert torch.equal(values.read("weight", "layer", start, stop, wanted), expected[start:stop])
            assert torch.equal(values.read("weight", "layer", 0, expected.numel(), wanted), expected)
            with pytest.raises(ValueError, match=f"must be there with at least {expected.numel() + 1} elements"):
                values.read("weight", "layer", 0, expected.numel() + 1, wanted)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_model_saved_in_shards_is_the_model(tmp_path: Path, size: int) -> None:
    """Every tensor rank writes its shards, cut at random; what all of them hold, the first."""
    checkpoint = save_pieces(tmp_path, 5, [sharded_pieces(index, size, seed=index) for index in range(size)])
    whole = state()
    assert newest_whole(tmp_path, contents=True) == checkpoint
    weights = read_weights(checkpoint)
    model, _ = load_model(checkpoint)
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], whole["weight", name])
        assert torch.equal(parameter, whole["weight", name])
    with CheckpointValues(checkpoint) as values:
        for spec in parameter_specs(MODEL):
            for count in (1, 2, 4):
                shard = spec.shard(count - 1, count)
                part = shard.of(whole["exp_avg", spec.name]).flatten()
                assert torch.equal(values.read("exp_avg", spec.name, 1, part.numel(), shard), part[1:])


Rows = list[tuple[int, int, int]]
"""Pieces as (shard, offset, number of elements)."""
GOOD: Rows = [(0, 0, 12), (1, 0, 5), (1, 5, 7)]
NOT_ONCE: dict[str, Rows] = {
    "a shard is missing": [(0, 0, 12)],
    "a gap at a shard's end": [(0, 0, 11), (1, 0, 12)],
    "a gap at a shard's start": [(0, 0, 12), (1, 1, 11)],
    "a gap within": [(0, 0, 4), (0, 5, 7), (1, 0, 12)],
    "an overlap within": [(0, 0, 5), (0, 4, 8), (1, 0, 12)],
    "an overlap across": [(0, 0, 13), (1, 1, 11)],
    "twice": [(0, 0, 12), (0, 0, 12), (1, 0, 12)],
    "a gap made up for by an overlap": [(0, 0, 11), (1, 0, 7), (1, 6, 6)],
    "all in the first": [(0, 0, 24)],
    "a shard too many": [(0, 0, 12), (2, 0, 12)],
    "a negative shard": [(0, 0, 12), (-1, 0, 12)],
    "a negative offset": [(0, 0, 12), (1, -1, 13)],
    "a negative number": [(0, 0, 12), (1, 0, 12), (1, 12, -12), (1, 0, 12)],
    "nothing": [(0, 0, 12), (1, 0, 0), (1, 0, 12)],
}


def entry(shape: Any = (4, 6), shard_dim: Any = 1, num_shards: Any = 2) -> dict[str, Any]:
    return {"shape": list(shape), "shard_dim": shard_dim, "num_shards": num_shards}


MALFORMED: dict[str, dict[str, Any]] = {
    "no such dimension": entry(shard_dim=2),
    "a negative dimension": entry(shard_dim=-1),
    "a dimension of text": entry(shard_dim="1"),
    "a dimension that is true": entry(shard_dim=True),
    "no shards": entry(num_shards=0),
    "negative shards": entry(num_shards=-2),
    "shards that do not divide": entry(num_shards=4),
    "half a shard": entry(num_shards=2.0),
    "no shape": entry(shape=(), shard_dim=0, num_shards=1),
    "a negative shape": entry(shape=(-4, -6), num_shards=1),
}


def refused(folder: Path) -> str:
    """What is said of a checkpoint, in one line."""
    with pytest.raises(ValueError, match="must") as raised:
        CheckpointValues(folder)
    assert newest_whole(folder.parents[1], contents=False) is None
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of one tensor [4, 6] in two shards along its columns, in three pieces."""
    whole = torch.arange(24.0).view(4, 6)
    left, right = (Shard(1, index, 2) for index in (0, 1))
    pieces = [
        Piece("weight", "layer", (4, 6), left, 0, left.of(whole).flatten(), True),
        Piece("weight", "layer", (4, 6), right, 0, right.of(whole).flatten()[:5], True),
        Piece("weight", "layer", (4, 6), right, 5, right.of(whole).flatten()[5:], True),
    ]
    return save_pieces(tmp_path, 5, [pieces])


def test_what_a_manifest_says_of_shards(saved: Path) -> None:
    loaded = CheckpointManifest.load(saved)
    assert loaded.tensors == {KEY: TensorEntry([4, 6], 1, 2)}
    index = loaded.check_sizes(saved)
    assert list(zip(index.shard, index.offset, index.numel, strict=True)) == GOOD
    loaded.check_contents(saved)


@pytest.mark.parametrize("name", NOT_ONCE)
def test_pieces_must_cover_every_shard_once(saved: Path, name: str) -> None:
    def change(columns: dict[str, list]) -> None:
        rows = NOT_ONCE[name]
        begins = [100] * len(rows)
        columns |= {"tensor": [KEY] * len(rows), "file": ["rank-00000.safetensors"] * len(rows), "begin": begins}
        columns |= dict(zip(("shard", "offset", "numel"), map(list, zip(*rows, strict=True)), strict=True))

    retable(saved, change)
    assert refused(saved) == f"{saved / PIECES}: pieces of {KEY} must cover its shape [4, 6] once"


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_shards_are_refused(saved: Path, name: str) -> None:
    edit(saved, lambda raw: raw["tensors"].update({KEY: MALFORMED[name]}))
    told = refused(saved)
    assert told.startswith(f"{saved / MANIFEST}: ")
    assert "Error" not in told


def test_ranks_must_agree_on_the_cut(tmp_path: Path) -> None:
    """A rank that holds another number of shards would be written under one that does not fit."""
    whole = torch.arange(24.0).view(4, 6)
    halves = [Piece("weight", "layer", (4, 6), Shard(1, 0, 2), 0, whole[:, :3].flatten(), True)]
    thirds = [Piece("weight", "layer", (4, 6), Shard(1, 1, 3), 0, whole[:, 2:4].flatten(), True)]
    with pytest.raises(ValueError, match="must cover its shape"):
        save_pieces(tmp_path, 5, [halves, thirds])


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor rank reads its own rows of a large matrix, and of shards along columns the rows that it needs."""
    whole, read = torch.arange(64.0 * 8).view(64, 8), []
    real = OpenFiles.read

    def counting(files: OpenFiles, name: str, begin: int, out: torch.Tensor) -> None:
        read.append(out.numel())
        real(files, name, begin, out)

    monkeypatch.setattr(OpenFiles, "read", counting)
    halves = [Shard(1, index, 2) for index in (0, 1)]
    for name, saved, wanted, start, stop, elements in (
        ("whole", [WHOLE], Shard(0, 3, 8), 8, 40, 32),
        ("whole, its columns", [WHOLE], Shard(1, 1, 4), 4, 10, 3 * 8),
        ("halves, a quarter", halves, Shard(1, 1, 4), 4, 10, 3 * 4),
        ("halves, whole", halves, WHOLE, 16, 32, 2 * 8),
    ):
        pieces = [Piece("weight", "layer", (64, 8), shard, 0, shard.of(whole).flatten(), True) for shard in saved]
        read.clear()
        with CheckpointValues(save_pieces(tmp_path / name, 5, [pieces])) as values:
            found = values.read("weight", "layer", start, stop, wanted)
        assert torch.equal(found, wanted.of(whole).flatten()[start:stop]), name
        assert sum(read) == elements, name
