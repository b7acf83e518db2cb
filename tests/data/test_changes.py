from __future__ import annotations

from pathlib import Path

import pytest

from megakor.data.changes import fingerprints, keep_tables
from megakor.data.source import Source
from tests.data.tokens import write_shards

BEGAN = [[[1, 2, 3], [4, 5]], [[6, 7]]]


def made(folder: Path, shards: list) -> dict[str, Source]:
    folder.mkdir(exist_ok=True)
    write_shards(folder, shards)
    return {"위키": Source(folder)}


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    sources = made(tmp_path / "a", BEGAN)
    assert fingerprints(tmp_path / "run", sources, []) == {"위키": sources["위키"].manifest.fingerprint()}


def test_a_changed_shard_is_named_and_may_be_accepted(tmp_path: Path) -> None:
    sources = made(tmp_path / "a", BEGAN)
    keep_tables(tmp_path / "run", sources)
    began = fingerprints(tmp_path / "run", sources, [])
    changed = made(tmp_path / "a", [BEGAN[0], [[6, 8]]])
    with pytest.raises(
        ValueError,
        match=r"a/shard-00001\.bin: has changed.*=\[위키/shard-00001\.bin\] waives this",
    ):
        fingerprints(tmp_path / "run", changed, ["위키/shard-00000.bin", "shard-00001.bin"])
    assert fingerprints(tmp_path / "run", changed, ["위키/shard-00001.bin"]) == began
    keep_tables(tmp_path / "run", changed)  # what the run began with stays
    with pytest.raises(ValueError, match="has changed since"):
        fingerprints(tmp_path / "run", changed, [])


def test_other_counts_cannot_be_accepted(tmp_path: Path) -> None:
    keep_tables(tmp_path / "run", made(tmp_path / "a", BEGAN))
    with pytest.raises(ValueError, match=r"shard-00001\.bin: .*6 bytes, must be \w+…, 4 bytes$"):
        fingerprints(tmp_path / "run", made(tmp_path / "a", [BEGAN[0], [[6, 7, 8]]]), ["위키/shard-00001.bin"])
    with pytest.raises(ValueError, match="has 3 shards, and must have the 2 that the run began with"):
        fingerprints(tmp_path / "run", made(tmp_path / "a", [*BEGAN, [[9]]]), [])
