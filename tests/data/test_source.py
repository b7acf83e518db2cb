from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakor.data import maps
from megakor.data.maps import Maps
from megakor.data.source import Source
from tests.data.conftest import CUTS, NUM_TOKENS


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 350))
def test_samples_of_a_shard_predict_each_of_its_tokens_once(folder: Path, length: int) -> None:
    source = Source(folder)
    counts = source.samples_of_shards(length)
    for shard, (start, end) in enumerate(itertools.pairwise(CUTS)):
        samples = [source.sample(shard, number, length) for number in range(counts[shard])]
        assert [token for sample in samples for token in sample[1:]] == list(range(start + 1, end))
        assert all(sample.tolist() == list(range(sample[0], sample[-1] + 1)) for sample in samples)
        sizes = source.num_labels(np.full(counts[shard], shard), np.arange(counts[shard]), length)
        assert sizes.tolist() == [len(sample) - 1 for sample in samples]
        assert all(size == length for size in sizes[:-1])


def test_read_goes_over_shards(folder: Path) -> None:
    source = Source(folder)
    assert source.read(0, NUM_TOKENS).tolist() == list(range(NUM_TOKENS))
    assert source.read(5, 300).tolist() == list(range(5, 305))
    with pytest.raises(ValueError, match="must lie within the source's 1000"):
        source.read(900, 101)


def test_no_shard_fills_a_sample(folder: Path) -> None:
    assert Source(folder).samples_of_shards(359).tolist() == [0, 1, 1, 0, 1, 1]
    with pytest.raises(ValueError, match=r"train\.sequence_length=360 must be below .* a shard of .*: 360"):
        Source(folder).samples_of_shards(360)


def test_few_open_files(folder: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of shards must not use up the descriptors, nor must many sources."""
    monkeypatch.setattr(maps, "MAX_OPEN", 2)
    shared = Maps()
    source, other = Source(folder, maps=shared), Source(small, maps=shared)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert source.read(0, NUM_TOKENS).tolist() == list(range(NUM_TOKENS))
        assert other.read(0, 50).tolist() == list(range(20_000, 20_050))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_maps_by_bytes() -> None:
    """The least recently used are closed before another is opened; one alone may be larger."""
    opened = Maps(max_bytes=10)
    for key, size in (("a", 4), ("b", 4), ("free", 0)):
        opened.add(key, size, lambda: np.empty(0))
    assert opened.get("a") is not None
    seen = []
    opened.add("c", 4, lambda: (seen.append("b" in opened), np.empty(0))[1])
    assert seen == [False]
    assert [key for key in ("a", "b", "c", "free") if key in opened] == ["a", "c", "free"]
    opened.add("big", 20, lambda: np.empty(0))
    assert [key for key in ("a", "c", "big") if key in opened] == ["big"]
    assert opened.get("a") is None
