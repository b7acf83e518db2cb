"""Training straight from Megatron data sets that others made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megakor.data.indexed import IndexedWriter
from megakor.data.source import Source
from tests.data.test_stream import made, whole


def write_pair(prefix: Path, documents: list[list[int]], dtype: str = "u2") -> None:
    writer = IndexedWriter(prefix, dtype)
    for document in documents:
        writer.add_document(document)
    writer.close()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    write_pair(tmp_path / "a_text_document", [list(range(100)), list(range(100, 130))])
    write_pair(tmp_path / "b_text_document", [list(range(1000, 1077))])
    return tmp_path


def test_a_pair_by_its_prefix_and_a_folder_of_pairs(pairs: Path) -> None:
    one, both = Source(pairs / "a_text_document"), Source(pairs)
    assert one.read(0, 130).tolist() == list(range(130))
    assert both.read(0, 207).tolist() == [*range(130), *range(1000, 1077)]
    assert both.document_starts(0).tolist() == [0, 100, 130]
    assert one.foreign


def test_a_run_on_pairs(pairs: Path) -> None:
    stream = made(pairs, sequence_length=10)
    _, labels, mask = whole(stream, 0)
    assert set(labels[mask == 1].tolist()) <= {*range(130), *range(1000, 1077)}


def test_it_is_what_megatron_makes(tmp_path: Path) -> None:
    """A set written by megatron-core itself."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "set.bin"), dtype=np.uint16)
    for document in ([5, 6, 7], [8, 9]):
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(str(tmp_path / "set.idx"))
    assert Source(tmp_path / "set").read(0, 5).tolist() == [5, 6, 7, 8, 9]


def test_identity(pairs: Path) -> None:
    before = Source(pairs).manifest.fingerprint()
    assert Source(pairs).manifest.fingerprint() == before
    write_pair(pairs / "b_text_document", [list(range(1000, 1076)), [7]])
    assert Source(pairs).manifest.fingerprint() != before


def test_what_is_wrong_with_a_pair(pairs: Path) -> None:
    tokens = pairs / "b_text_document.bin"
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=r"b_text_document\.bin: size=152 must be 154, as its index says"):
        Source(pairs)
    tokens.write_bytes(content)
    write_pair(pairs / "c_text_document", [[1, 2]], "i4")
    with pytest.raises(ValueError, match="pairs must have tokens of one type, not of .*int32.*uint16"):
        Source(pairs)
    (pairs / "c_text_document.idx").unlink()
    tokens.unlink()
    with pytest.raises(FileNotFoundError, match=r"b_text_document\.bin"):
        Source(pairs)


def test_unfinished_shards_of_our_own(pairs: Path) -> None:
    """They have pairs and no manifest either, and are not whole."""
    (pairs / "shard-00000.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"manifest\.json: not there; `megakor shard out=.*` writes it once"):
        Source(pairs)


def test_a_token_that_the_tokenizer_has_not(tmp_path: Path) -> None:
    """Of shards of one's own the tokenizer is known; of others' it shows when they are read."""
    write_pair(tmp_path / "set", [[*range(20), 60_000]])
    stream = made(tmp_path / "set", sequence_length=20, global_batch_size=1)
    with pytest.raises(ValueError, match="token 60000 must be below the tokenizer's vocabulary, 60000"):
        stream.micro_batches(0, 0, 1, 1)
