from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakor.data.indexed import IndexedReader, IndexedWriter, dtype_for

DOCUMENTS = [[1, 2, 3], [4], [65_535, 0], [7] * 100]


def write(prefix: Path, documents: list[list[int]], dtype: str) -> None:
    writer = IndexedWriter(prefix, dtype)
    for document in documents:
        writer.add_document(document)
    files = writer.close()
    assert set(files) == {f"{prefix.name}.bin", f"{prefix.name}.idx"}
    for name, record in files.items():
        data = (prefix.parent / name).read_bytes()
        assert (record.size, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 65_535), max_size=20), max_size=10),
    st.sampled_from(["u2", "i4"]),
)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: str
) -> None:
    prefix = tmp_path_factory.mktemp("shard") / "a"
    write(prefix, documents, dtype)
    reader = IndexedReader(prefix)
    assert [reader[index].tolist() for index in range(len(reader))] == documents
    assert reader.tokens.tolist() == [token for document in documents for token in document]
    assert (reader.num_documents, reader.num_tokens) == (len(documents), len(reader.tokens))
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["a.bin", "a.idx"]


@pytest.fixture(scope="module")
def megatron():  # type: ignore[no-untyped-def]
    """Megatron-core's module for this format (the extra `megatron`)."""
    return pytest.importorskip(
        "megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed", exc_type=ImportError
    )


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_reads_ours(megatron, tmp_path: Path, dtype: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "a", DOCUMENTS, dtype)
    theirs = megatron.IndexedDataset(str(tmp_path / "a"))
    assert [theirs[index].tolist() for index in range(len(theirs))] == DOCUMENTS
    assert theirs.index.dtype == np.dtype(dtype)
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert theirs.sequence_lengths.tolist() == [3, 1, 2, 100]
    assert theirs.get(3, offset=98).tolist() == [7, 7]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_files_are_those_megatron_writes(megatron, tmp_path: Path, dtype: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "ours", DOCUMENTS, dtype)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
    for document in DOCUMENTS:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


@pytest.mark.parametrize("multimodal", [False, True])
def test_we_read_megatrons(megatron, tmp_path: Path, multimodal: bool) -> None:  # type: ignore[no-untyped-def]
    """Documents of several sequences, a type we do not write, and the trailing modes of multimodal sets."""
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int64, multimodal=multimodal)
    modes = [0, 1] if multimodal else None
    builder.add_document(np.array([1, 2, 3, 4, 5]), [2, 3], modes)
    builder.add_document(np.array([6, 7**20]), [1, 1], modes)
    builder.finalize(str(tmp_path / "a.idx"))
    reader = IndexedReader(tmp_path / "a")
    assert [reader[index].tolist() for index in range(len(reader))] == [[1, 2], [3, 4, 5], [6], [7**20]]
    assert reader.document_indices.tolist() == [0, 2, 4]
    assert (reader.num_documents, reader.num_tokens) == (2, 7)


def test_type_follows_the_vocabulary() -> None:
    assert [dtype_for(size).name for size in (300, 65_536, 65_537)] == ["uint16", "uint16", "int32"]


@pytest.mark.parametrize("bad", [[65_536], [-1], [1.5]])
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, bad: list[int]) -> None:
    writer = IndexedWriter(tmp_path / "a", "u2")
    with pytest.raises(ValueError, match="uint16"):
        writer.add_document(bad)
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_damage_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS, "u2")
    whole = {name: (tmp_path / name).read_bytes() for name in ("a.bin", "a.idx")}
    damaged = {
        "a.bin": (whole["a.bin"][:-2], "a.bin: size=210 must be 212"),
        "a.idx": (whole["a.idx"][:-8], "a.idx: size=.* must be at least .*truncated"),
    }
    for name, (data, message) in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            IndexedReader(tmp_path / "a")
        (tmp_path / name).write_bytes(whole[name])
    (tmp_path / "a.idx").write_bytes(b"PK\x03\x04" + whole["a.idx"][4:])
    with pytest.raises(ValueError, match="header of a Megatron index"):
        IndexedReader(tmp_path / "a")
