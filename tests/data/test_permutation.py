from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakor.data.permutation import MAX_SIZE, child_keys, permutation, permute, root_keys, unpermute


def test_golden() -> None:
    """These numbers are part of the order's version, and of every checkpoint's meaning."""
    assert permutation(10, root_keys("golden")).tolist() == [8, 7, 1, 6, 4, 2, 3, 5, 9, 0]


@settings(deadline=None)
@given(st.lists(st.integers(1, MAX_SIZE), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_the_way_back(sizes: list[int], random: object) -> None:
    values = np.array([random.randrange(size) for size in sizes])  # type: ignore[attr-defined]
    keys = child_keys(root_keys("a")[None], np.arange(len(sizes)))
    assert np.array_equal(unpermute(permute(values, np.array(sizes), keys), np.array(sizes), keys), values)


@settings(deadline=None)
@given(st.text(), st.integers(1, 3000))
def test_every_value_once(text: str, size: int) -> None:
    assert np.array_equal(np.sort(permutation(size, root_keys(text))), np.arange(size))


@settings(deadline=None)
@given(st.lists(st.integers(1, MAX_SIZE), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_each_value_in_a_permutation_of_its_own(sizes: list[int], random: object) -> None:
    """Mixed sizes at once give what each gives alone, within its size."""
    values = np.array([random.randrange(size) for size in sizes])  # type: ignore[attr-defined]
    keys = child_keys(root_keys("a")[None], np.arange(len(sizes)))
    together = permute(values, np.array(sizes), keys)
    alone = [permute(values[i : i + 1], np.array([sizes[i]]), keys[i : i + 1])[0] for i in range(len(sizes))]
    assert together.tolist() == alone
    assert all(0 <= value < size for value, size in zip(together.tolist(), sizes, strict=True))


def test_shuffled_evenly() -> None:
    """Neighbours, places and other keys are as independent as in a true shuffle, within 5 standard deviations."""
    n = 20_000
    first, second, other = (permutation(n, root_keys(text)) for text in ("1", "2", "other"))
    limit = 5 / np.sqrt(n)
    for left, right in ((first[:-1], first[1:]), (first, np.arange(n)), (first, second), (first, other)):
        assert abs(np.corrcoef(left, right)[0, 1]) < limit


@pytest.mark.parametrize("size", [2, 3, 5, 10, 17])
def test_small_sets_have_no_favourites(size: int) -> None:
    """Over many keys each value comes equally often at each place, though the network's halves are a few bits."""
    times = 1500
    keys = child_keys(root_keys("small")[None], np.repeat(np.arange(times), size))
    places = permute(np.tile(np.arange(size), times), np.array(size), keys).reshape(times, size)
    counts = np.stack([(places == value).sum(axis=0) for value in range(size)])
    chi_squared = ((counts - times / size) ** 2 / (times / size)).sum()
    freedom = (size - 1) ** 2
    assert chi_squared < freedom + 6 * np.sqrt(2 * freedom)
