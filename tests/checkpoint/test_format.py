from __future__ import annotations

import pickle
import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from megakor.checkpoint.format import MANIFEST, CheckpointManifest
from megakor.checkpoint.reader import CheckpointValues, newest_whole
from megakor.files import sha256_of
from tests.checkpoint.pieces import edit, manifest, retable, save
from tests.config.commands import command


@pytest.fixture
def saved(tmp_path: Path, alone: None) -> Path:
    return save(tmp_path / "run", 10)


def test_manifests_round_trip(saved: Path) -> None:
    loaded = CheckpointManifest.load(saved)
    loaded.check_contents(saved)
    again = CheckpointManifest.load(saved)
    assert again == loaded
    expected = manifest(10)
    for name in ("step", "num_tokens", "model", "tokenizer_fingerprint", "optimizer", "data", "train"):
        assert getattr(loaded, name) == getattr(expected, name)
    assert set(loaded.files) == {path.name for path in saved.iterdir()} - {MANIFEST}


def test_a_missing_manifest(saved: Path) -> None:
    (saved / MANIFEST).unlink()
    with pytest.raises(ValueError, match=rf"{MANIFEST}: missing; the folder must be a whole checkpoint"):
        CheckpointManifest.load(saved)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '"x"',
        "{}",
        '{"version": 1}',
        '{"version": 1, "files": [], "tensors": {}}',
        "\x00" * 20,
    ],
)
def test_a_damaged_manifest(saved: Path, text: str) -> None:
    (saved / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=MANIFEST):
        CheckpointManifest.load(saved)
    assert newest_whole(saved.parents[1], contents=True) is None


def test_a_manifest_cut_off_anywhere(saved: Path) -> None:
    data = (saved / MANIFEST).read_bytes()
    for size in random.Random(0).sample(range(len(data)), 25):
        (saved / MANIFEST).write_bytes(data[:size])
        with pytest.raises(ValueError, match=MANIFEST):
            CheckpointManifest.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["tensors"].update({"weight/x": {"shape": "ab", "shard_dim": 0, "num_shards": 1}}),
        lambda raw: raw["tensors"].update({"weight/x": {"shape": [3], "shard_dim": 0, "num_shards": 2}}),
        lambda raw: raw["tensors"].update({"weight/x": {"shape": [2], "shard_dim": 0, "num_shards": 1}}),
        lambda raw: raw["files"].pop("pieces.parquet"),
        lambda raw: raw["files"].update({"a": {"size": 1}}),
        lambda raw: raw.update(step="zehn"),
        lambda raw: raw.update(extra=1),
    ],
    ids=["text for a shape", "unequal shards", "no pieces", "no table", "no digest", "text for a step", "unknown"],
)
def test_a_manifest_of_other_types_is_passed_over(
    saved: Path, alone: None, change: Callable[[dict[str, Any]], None]
) -> None:
    """A resume must go on from the older checkpoint, not stop at the newer one."""
    run = saved.parents[1]
    newer = save(run, 20)
    edit(newer, change)
    assert newest_whole(run, contents=True) == saved


def test_another_version(saved: Path) -> None:
    edit(saved, lambda raw: raw.update(version=2))
    with pytest.raises(ValueError, match=r"version=2 must be 3"):
        CheckpointManifest.load(saved)


@pytest.mark.parametrize("name", ["../rank-00000.safetensors", "/etc/passwd", "a/b", ".."])
def test_file_names_that_leave_the_folder(saved: Path, name: str) -> None:
    edit(saved, lambda raw: raw["files"].update({name: {"size": 1, "sha256": "0"}}))
    with pytest.raises(ValueError, match=r"must not leave the folder|missing"):
        CheckpointManifest.load(saved).check_sizes(saved)


def test_tables_are_written_and_read_without_pandas() -> None:
    """Which Arrow would import, for a third of a second on every rank."""
    code = (
        "import sys; from megakor.checkpoint.pieces import Held, PieceIndex\n"
        "held = {'file': [Held('weight/a', (4,), 0, 1, 0, 0, 4, 8)]}\n"
        "assert len(PieceIndex.from_bytes(PieceIndex.of(held).to_bytes())) == 1; assert 'pandas' not in sys.modules"
    )
    done = command("-c", code)
    assert done.returncode == 0, done.stderr


def put(column: str, row: int, value: object) -> Callable[[dict[str, list]], None]:
    return lambda columns: columns[column].__setitem__(row, value)


@pytest.mark.parametrize("name", ["../other.safetensors", "{outside}"])
def test_pieces_that_leave_the_folder(saved: Path, name: str) -> None:
    """A piece names its file too; one that no digest covers must not be read."""
    outside = saved.parent / "other.safetensors"
    shutil.copy(saved / "rank-00000.safetensors", outside)
    retable(saved, lambda columns: columns.update(file=[name.format(outside=outside)] * len(columns["file"])))
    with pytest.raises(ValueError, match=r"other.safetensors"):
        CheckpointValues(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("begin", 3, 10**9), "a piece of .* must lie within rank-00000.safetensors"),
        (put("begin", 3, -4), "a piece of .* must lie within rank-00000.safetensors"),
        (put("numel", 3, 1), r"pieces of .* must cover its shape \[.*\] once"),
        (put("offset", 3, 1), r"pieces of .* must cover its shape \[.*\] once"),
        (put("shard", 3, 1), r"pieces of .* must cover its shape \[.*\] once"),
        (put("tensor", 0, "weight/x"), "pieces of .* must cover its shape once: one or the other"),
        (put("numel", 0, None), "damaged"),
        (put("tensor", 0, None), "damaged"),
        (put("file", 5, None), "damaged"),
        (lambda columns: columns.pop("file"), "damaged"),
        (lambda columns: columns.update(offset=["x"] * len(columns["offset"])), "damaged"),
        (lambda columns: columns.pop("begin"), "damaged"),
    ],
)  # fmt: skip
def test_a_table_that_says_otherwise(saved: Path, change: Callable, message: str) -> None:
    retable(saved, change)
    with pytest.raises(ValueError, match=rf"pieces\.parquet: {message}"):
        CheckpointValues(saved)
    assert newest_whole(saved.parents[1], contents=True) is None


def test_a_file_too_many(saved: Path) -> None:
    (saved / ".nfs0001").touch()
    CheckpointManifest.load(saved).check_sizes(saved)
    (saved / "rank-00007.safetensors").touch()
    with pytest.raises(ValueError, match=r"rank-00007\.safetensors: must not be there; the manifest does not name it"):
        CheckpointManifest.load(saved).check_sizes(saved)


def test_a_flipped_step_is_noticed(saved: Path) -> None:
    """The step decides which data come next; it is damaged where it differs from the folder's name."""
    edit(saved, lambda raw: raw.update(step=11))
    assert newest_whole(saved.parents[1], contents=True) is None


def test_missing_and_truncated_files(saved: Path) -> None:
    file = saved / "rank-00000.safetensors"
    size, data = file.stat().st_size, file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=rf"rank-00000.safetensors: {size - 1} bytes; must be {size} bytes"):
        CheckpointManifest.load(saved).check_sizes(saved)
    with pytest.raises(ValueError, match="rank-00000"):
        CheckpointValues(saved)
    file.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match=rf"{size + 1} bytes; must be {size}"):
        CheckpointManifest.load(saved).check_sizes(saved)
    file.unlink()
    with pytest.raises(ValueError, match=rf"rank-00000.safetensors: missing; must be {size} bytes"):
        CheckpointManifest.load(saved).check_sizes(saved)


def test_every_flipped_bit_is_noticed(saved: Path) -> None:
    file = saved / "rank-00000.safetensors"
    data, rng = file.read_bytes(), random.Random(0)
    for place in [0, 7, 8, 100, len(data) - 1, *(rng.randrange(len(data)) for _ in range(20))]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"rank-00000.safetensors: SHA-256 differs"):
            CheckpointManifest.load(saved).check_contents(saved)
    file.write_bytes(data)
    CheckpointManifest.load(saved).check_contents(saved)


class Bomb:
    """Pickled, it runs code when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize(("name", "refused"), [
    ("manifest.json", True), ("pieces.parquet", True), ("rank-00000.safetensors", True), ("model.bin", False),
])  # fmt: skip
def test_a_pickle_with_code_in_it(saved: Path, tmp_path: Path, name: str, refused: bool) -> None:
    """In any place of a checkpoint, entered as if it belonged there: it is refused, or not looked into."""
    mark = tmp_path / "ran"
    (saved / name).write_bytes(pickle.dumps(Bomb(mark)))
    if name != "manifest.json":
        entry = {"size": (saved / name).stat().st_size, "sha256": sha256_of(saved / name)}
        edit(saved, lambda raw: raw["files"].update({name: entry}))
    with pytest.raises(ValueError, match="must") if refused else nullcontext(), CheckpointValues(saved) as values:
        values.manifest.check_contents(saved)
        values.read("weight", "gpt_neox.final_layer_norm.weight", 0, 4)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()
