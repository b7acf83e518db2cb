from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakor.data.order import ORDER_VERSION, sample_ids

GOLDEN_10 = [5, 1, 0, 7, 9, 4, 6, 8, 3, 2, 6, 9, 8, 5, 3, 4, 0, 7, 2, 1]
GOLDEN_MILLION = [213788, 165999, 145142, 347416, 707475, 521010, 590672, 355119]
GOLDEN_LARGEST = [4523940585659130911, 1843830928689511498, 894833698955239791, 3331700693461987827]

seeds = st.integers(-(2**70), 2**70)


def test_golden() -> None:
    """These numbers decide which data a resumed run sees: a change needs a new ORDER_VERSION."""
    assert ORDER_VERSION == 1
    assert sample_ids(1234, 10, 0, 20).tolist() == GOLDEN_10
    assert sample_ids(1234, 1_000_003, 999_999, 8).tolist() == GOLDEN_MILLION
    assert sample_ids(-7, 2**62, 3 * 2**62 - 2, 4).tolist() == GOLDEN_LARGEST


@settings(deadline=None)
@given(seeds, st.integers(1, 3000), st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(seed: int, num_samples: int, epoch: int) -> None:
    ids = sample_ids(seed, num_samples, epoch * num_samples, num_samples)
    assert np.array_equal(np.sort(ids), np.arange(num_samples))


@settings(deadline=None)
@given(seeds, st.integers(1, 200), st.integers(0, 10**12), st.lists(st.integers(0, 150), max_size=8))
def test_any_cut_gives_the_same_order(seed: int, num_samples: int, start: int, counts: list[int]) -> None:
    whole = sample_ids(seed, num_samples, start, sum(counts))
    starts = np.cumsum([start, *counts]).tolist()
    parts = [sample_ids(seed, num_samples, first, count) for first, count in zip(starts, counts, strict=False)]
    assert np.array_equal(whole, np.concatenate([np.empty(0, np.int64), *parts]))


def test_shuffled_evenly() -> None:
    """Neighbours, places and epochs are as independent as in a true shuffle, within 5 standard deviations."""
    n = 20_000
    first, second, other = (sample_ids(seed, n, start, n) for seed, start in ((1, 0), (1, n), (2, 0)))
    limit = 5 / np.sqrt(n)
    for left, right in ((first[:-1], first[1:]), (first, np.arange(n)), (first, second), (first, other)):
        assert abs(np.corrcoef(left, right)[0, 1]) < limit


@pytest.mark.parametrize("num_samples", [2, 3, 5, 10, 17])
def test_small_sets_have_no_favourites(num_samples: int) -> None:
    """Over many epochs each sample comes equally often at each place, though the network's halves are a few bits."""
    epochs = 1500
    places = sample_ids(3, num_samples, 0, epochs * num_samples).reshape(epochs, num_samples)
    counts = np.stack([(places == sample).sum(axis=0) for sample in range(num_samples)])
    expected = epochs / num_samples
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (num_samples - 1) ** 2
    assert chi_squared < freedom + 6 * np.sqrt(2 * freedom)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="num_samples=0"):
        sample_ids(1, 0, 0, 1)
    with pytest.raises(ValueError, match="start=-1"):
        sample_ids(1, 5, -1, 1)
