from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from megakor.data.indexed import IndexedReader
from megakor.data.ledger import find, passages, steps
from tests.data.conftest import EOD
from tests.data.test_stream import made, whole


def test_a_step_is_made_of_its_passages(folder: Path, small: Path) -> None:
    """The passages' tokens, laid end to end, are the rows."""
    stream = made({"a": folder, "b": small}, sequence_length=40, global_batch_size=16)
    inputs, labels, mask = whole(stream, 6)
    found = passages(stream, 7)
    assert {passage.source for passage in found} == {"a", "b"}
    for row in range(16):
        tokens: list[int] = []
        for passage in (passage for passage in found if passage.row == row):
            reader = IndexedReader((folder if passage.source == "a" else small) / passage.shard)
            document = reader[passage.number]
            assert 0 <= passage.start < passage.stop <= len(document)
            tokens += document[passage.start : passage.stop].tolist()
        size = int(mask[row].sum())
        assert tokens == [inputs[row, 0], *labels[row, :size]]
        assert (labels[row, size:] == EOD).all()


@settings(deadline=None, max_examples=15)
@given(
    length=st.integers(3, 60),
    size=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    epochs=st.none() | st.integers(1, 3),
    skip=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=1),
)
def test_steps_of_a_document(
    folder: Path, small: Path, length: int, size: int, seed: int, epochs: int | None, skip: list[tuple[int, int]]
) -> None:
    """For every document the steps are those whose passages name it."""
    keys = {"max_epochs": {"b": epochs}} if epochs else {}
    try:
        stream = made(
            {"a": folder, "b": small}, sequence_length=length, global_batch_size=size, seed=seed,
            skip=[[start, start + count] for start, count in skip], weights={"a": 1.0, "b": 1.0}, **keys,
        )  # fmt: skip
    except ValueError:
        reject()  # long samples: the small source has too few of them
    num_steps = 120 // size
    seen: dict[tuple[str, str, int], set[int]] = {}
    for step in range(1, num_steps + 1):
        for passage in passages(stream, step):
            seen.setdefault((passage.source, passage.shard, passage.number), set()).add(step)
    for name, source in stream.sources.items():
        for shard, entry in enumerate(source.manifest.shards):
            for number in range(entry.num_documents):
                expected = sorted(seen.get((name, entry.prefix, number), set()))
                assert steps(stream, name, shard, number, num_steps) == expected


def test_shards_of_other_makers_have_no_ids(folder: Path) -> None:
    stream = made(folder)
    assert {passage.document for passage in passages(stream, 1)} == {None}
    assert list(find(stream.sources[""], "1", range(6))) == []


def test_no_more_than_there_is(folder: Path) -> None:
    stream = made(folder, max_epochs={"": 1}, num_steps=1)
    with pytest.raises(ValueError, match=r"must be below \d+, where all sources have been read"):
        passages(stream, int(np.ceil(stream.orders[0].num_samples / 8)) + 1)
