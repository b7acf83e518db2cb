from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakor.data.mixture import BLOCK, Mixture, Share

weights = st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any)


def shares(count: int, **limits: int) -> list[Share]:
    return [Share(str(index), 700, limits.get(f"epochs_{index}")) for index in range(count)]


@settings(deadline=None, max_examples=50)
@given(weights, st.integers(0, 10**9), st.integers(-(2**40), 2**40))
def test_each_source_counts_on(drawn: list[int], block: int, seed: int) -> None:
    """In every block a source's positions are those after the block before, each once and in order."""
    mixture = Mixture(shares(len(drawn)), {0: drawn}, seed)
    sources, places = mixture.at(np.arange(block * BLOCK, (block + 2) * BLOCK))
    for index, weight in enumerate(drawn):
        mine = places[sources == index]
        if weight:
            exact = Fraction(weight, sum(drawn)) * block * BLOCK
            assert abs(int(mine[0]) - exact) <= 1
            assert np.array_equal(mine, np.arange(mine[0], mine[0] + len(mine)))
        else:
            assert len(mine) == 0


@settings(deadline=None, max_examples=30)
@given(weights, st.integers(0, 10**6), st.lists(st.integers(0, 3000), max_size=5))
def test_any_cut_gives_the_same_turns(drawn: list[int], start: int, counts: list[int]) -> None:
    mixture = Mixture(shares(len(drawn)), {0: drawn}, 7)
    whole = np.stack(mixture.at(np.arange(start, start + sum(counts))))
    cuts = np.cumsum([start, *counts])
    parts = [np.stack(mixture.at(np.arange(a, b))) for a, b in itertools.pairwise(cuts)]
    assert np.array_equal(whole, np.concatenate([np.empty((2, 0), int), *parts], axis=1))


def test_weights_change_where_they_are_told_to() -> None:
    mixture = Mixture(shares(2), {0: [1, 0], 3 * BLOCK - 5: [1, 3]}, 1)
    sources, places = mixture.at(np.arange(7 * BLOCK))
    assert not sources[: 3 * BLOCK].any()
    assert (sources[3 * BLOCK :] == 1).sum() == 3 * BLOCK
    assert np.array_equal(places[sources == 0], np.arange(4 * BLOCK))


def test_a_source_is_read_as_often_as_it_may_be() -> None:
    mixture = Mixture(shares(2, epochs_0=4), {0: [1, 1]}, 1)
    sources, places = mixture.at(np.arange(20 * BLOCK))
    used = (sources == 0).sum()
    assert 4 * 700 - BLOCK / 2 - 1 <= used <= 4 * 700  # to within a block
    assert places[sources == 0].max() == used - 1
    assert (sources[-BLOCK:] == 1).all()
    assert mixture.end is None


def test_the_end() -> None:
    mixture = Mixture(shares(2, epochs_0=4, epochs_1=8), {0: [1, 2]}, 1)
    assert mixture.end is not None
    sources, _ = mixture.at(np.arange(mixture.end))
    for index, limit in ((0, 2800), (1, 5600)):
        assert limit - BLOCK <= (sources == index).sum() <= limit
    with pytest.raises(ValueError, match=f"must be below {mixture.end}"):
        mixture.at(np.array([mixture.end]))


def test_sources_take_turns_evenly() -> None:
    """Neighbouring turns are as independent as drawn ones."""
    sources, _ = Mixture(shares(2), {0: [1, 1]}, 1).at(np.arange(100 * BLOCK))
    assert abs(np.corrcoef(sources[:-1], sources[1:])[0, 1]) < 5 / np.sqrt(len(sources))


@pytest.mark.parametrize(("curriculum", "message"), [
    ({0: [1, -1]}, "not negative"),
    ({0: [0, 0]}, "not all 0"),
    ({0: [1]}, "one for each source"),
    ({5: [1, 1]}, "from position 0"),
])  # fmt: skip
def test_bad_weights(curriculum: dict[int, list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(shares(2), curriculum, 1)
