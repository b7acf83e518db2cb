from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megakor.data.manifest import (
    MANIFEST_NAME,
    TABLE_NAME,
    Manifest,
    check_files,
    load_manifest,
    verify_manifest,
)
from megakor.data.remote import RemoteFolder
from megakor.files import sha256_of
from tests.data.tokens import write_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path, [[[1, 2, 3], [4, 5]], [[6, 7]]])
    return tmp_path


def load(folder: Path) -> Manifest:
    return load_manifest(RemoteFolder(str(folder)))


def edit(folder: Path, old: str, new: str) -> None:
    path = folder / MANIFEST_NAME
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def edit_table(folder: Path, column: str, value: Any) -> None:
    """The last shard's value of a column, in a table that belongs to its manifest."""
    table = pq.read_table(folder / TABLE_NAME)
    values = [*table[column].to_pylist()[:-1], value]
    number = table.schema.get_field_index(column)
    pq.write_table(table.set_column(number, table.schema.field(column), [values]), folder / TABLE_NAME)
    raw = json.loads((folder / MANIFEST_NAME).read_text())
    edit(folder, raw["table"]["sha256"], sha256_of(folder / TABLE_NAME))


def test_counts_and_round_trip(folder: Path) -> None:
    manifest = verify_manifest(folder)
    assert (manifest.num_tokens, manifest.num_documents, manifest.num_text_bytes) == (7, 3, 20)
    assert manifest.sources == ["test"]
    raw = json.loads((folder / MANIFEST_NAME).read_text())
    assert (raw["num_tokens"], raw["version"], raw["eod_id"]) == (7, 2, 0)


def test_fingerprint_is_of_the_tokens(tmp_path: Path) -> None:
    shards = {
        "a": [[[1, 2, 3]]],
        "same": [[[1, 2, 3]]],
        "other": [[[1, 2, 4]]],
        "cut": [[[1, 2]], [[3]]],
    }
    fingerprints = {}
    for name, documents in shards.items():
        (tmp_path / name).mkdir()
        fingerprints[name] = write_shards(tmp_path / name, documents).fingerprint()
    assert fingerprints["a"] == fingerprints["same"] == load(tmp_path / "a").fingerprint()
    assert len(set(fingerprints.values())) == 3


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"manifest\.json: not there; `megakor shard"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["shard-00001.bin", "shard-00000.idx"])
def test_truncated_shard(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{name}: size=\d+, must be \d+ bytes.*truncated"):
        check_files(RemoteFolder(str(folder)), load(folder))
    path.unlink()
    with pytest.raises(ValueError, match=f"{name}: missing"):
        check_files(RemoteFolder(str(folder)), load(folder))


def test_changed_shard(folder: Path) -> None:
    (folder / "shard-00001.bin").write_bytes(b"\x09\x00\x09\x00")
    check_files(RemoteFolder(str(folder)), load(folder))  # same size
    with pytest.raises(ValueError, match=r"shard-00001\.bin: sha256="):
        verify_manifest(folder)


@pytest.mark.parametrize("name", ["../shard-00001", "/etc/shard-00001", "a/../../shard-00001", ""])
def test_names_outside_the_folder(folder: Path, name: str) -> None:
    edit_table(folder, "prefix", name)
    with pytest.raises(ValueError, match=r"manifest\.json.*must stay inside"):
        load(folder)


def test_table_of_another_manifest(folder: Path) -> None:
    (folder / TABLE_NAME).write_bytes((folder / TABLE_NAME).read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"shards\.parquet: sha256=\w+ must be \w+: changed"):
        load(folder)
    (folder / TABLE_NAME).unlink()
    with pytest.raises(ValueError, match=r"is no manifest of shards with its shards\.parquet: FileNotFoundError"):
        load(folder)


def test_counts_of_tokens(folder: Path) -> None:
    edit_table(folder, "num_tokens", 3)
    with pytest.raises(ValueError, match=r"shard-00001\.bin: size=4 must be 6 for 3 tokens"):
        load(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 2', '"version": 1', "version=1 must be 2"),
        ('"eod_id"', '"eod"', "eod_id"),
        ("{", "", "is no manifest"),
    ],
)
def test_malformed(folder: Path, old: str, new: str, message: str) -> None:
    edit(folder, old, new)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_tokenizer_of_the_shards(folder: Path) -> None:
    manifest = load(folder)
    manifest.check_tokenizer("fingerprint", "data.tokenizer=here")
    with pytest.raises(ValueError, match=r"data\.tokenizer=here: the tokenizer's fingerprint=another"):
        manifest.check_tokenizer("another", "data.tokenizer=here")
