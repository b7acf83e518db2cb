from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakor.data import source as source_module
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


def test_few_open_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of shards must not use up the descriptors."""
    monkeypatch.setattr(source_module, "MAX_OPEN_SHARDS", 2)
    source = Source(folder)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert source.read(0, NUM_TOKENS).tolist() == list(range(NUM_TOKENS))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
