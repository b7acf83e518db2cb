from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megakor.checkpoint.format import MANIFEST, CheckpointManifest, digest
from megakor.checkpoint.reader import CheckpointValues, newest_whole
from tests.checkpoint.pieces import manifest, save


@pytest.fixture
def saved(tmp_path: Path, alone: None) -> Path:
    return save(tmp_path / "run", 10)


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = json.loads((folder / MANIFEST).read_text())
    del raw["digest"]
    change(raw)
    (folder / MANIFEST).write_text(json.dumps({**raw, "digest": digest(raw)}))  # as a writer would have it


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
        lambda raw: raw["tensors"].update({"weight/x": {"shape": [2], "pieces": [["a", 0]]}}),
        lambda raw: raw["tensors"].update({"weight/x": {"shape": [2], "pieces": [["a", "0", "2"]]}}),
        lambda raw: raw["tensors"].update({"weight/x": {"shape": "ab", "pieces": []}}),
        lambda raw: raw["tensors"].update({"weight/x": {"shape": [2], "pieces": 3}}),
        lambda raw: raw["files"].update({"a": {"size": 1}}),
        lambda raw: raw.update(step="zehn"),
        lambda raw: raw.update(extra=1),
    ],
    ids=["short piece", "text in a piece", "text for a shape", "no list", "no digest", "text for a step", "unknown"],
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
    edit(saved, lambda raw: raw.update(version=3))
    with pytest.raises(ValueError, match=r"version=3 must be 2"):
        CheckpointManifest.load(saved)


@pytest.mark.parametrize("name", ["../rank-00000.safetensors", "/etc/passwd", "a/b", ".."])
def test_file_names_that_leave_the_folder(saved: Path, name: str) -> None:
    edit(saved, lambda raw: raw["files"].update({name: {"size": 1, "sha256": "0"}}))
    with pytest.raises(ValueError, match=r"must not leave the folder|missing"):
        CheckpointManifest.load(saved).check_sizes(saved)


@pytest.mark.parametrize("name", ["../other.safetensors", "{outside}"])
def test_pieces_that_leave_the_folder(saved: Path, name: str) -> None:
    """A piece names its file too; one that no digest covers must not be read."""
    outside = saved.parent / "other.safetensors"
    shutil.copy(saved / "rank-00000.safetensors", outside)
    name = name.format(outside=outside)

    def lead_away(raw: dict[str, Any]) -> None:
        for entry in raw["tensors"].values():
            entry["pieces"] = [[name, *numbers] for _, *numbers in entry["pieces"]]

    edit(saved, lead_away)
    with pytest.raises(ValueError, match=r"other.safetensors"), CheckpointValues(saved) as values:
        values.weight("gpt_neox.final_layer_norm.weight", 0, 4)


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


@pytest.mark.parametrize("change", ["gap", "overlap", "too long", "missing"])
def test_pieces_must_cover_a_tensor_once(saved: Path, change: str) -> None:
    def move(raw: dict[str, Any]) -> None:
        entry = next(iter(raw["tensors"].values()))
        file, _, _, size = entry["pieces"][0]
        entry["pieces"] = {
            "gap": [[file, 0, 0, 2], [file, 0, 3, size - 3]],
            "overlap": [[file, 0, 0, 4], [file, 0, 2, size - 2]],
            "too long": [[file, 0, 0, size + 1]],
            "missing": [],
        }[change]

    edit(saved, move)
    with pytest.raises(ValueError, match="must cover its shape"):
        CheckpointManifest.load(saved).check_sizes(saved)
