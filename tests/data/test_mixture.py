from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakor.data.mixture import Mixture, Share

weights = st.lists(st.integers(0, 50) | st.integers(0, 10**6), min_size=1, max_size=9).filter(any)


def shares(count: int, **limits: int) -> list[Share]:
    return [Share(str(index), 700, limits.get(f"epochs_{index}")) for index in range(count)]


@settings(deadline=None, max_examples=50)
@given(weights, st.integers(0, 10**9), st.integers(-(2**40), 2**40))
def test_each_source_counts_on(drawn: list[int], block: int, seed: int) -> None:
    """In every block a source's positions are those after the block before, each once and in order."""
    mixture = Mixture(shares(len(drawn)), {0: drawn}, seed)
    size = mixture.block
    sources, places = mixture.at(np.arange(block * size, (block + 2) * size))
    for index, weight in enumerate(drawn):
        mine = places[sources == index]
        exact = Fraction(weight, sum(drawn)) * block * size
        rounding = 1 if index != drawn.index(max(drawn)) else len(drawn)
        if len(mine):
            assert abs(int(mine[0]) - exact) <= rounding
            assert np.array_equal(mine, np.arange(mine[0], mine[0] + len(mine)))
        assert abs(len(mine) - Fraction(weight, sum(drawn)) * 2 * size) <= rounding


@settings(deadline=None, max_examples=30)
@given(weights, st.integers(0, 10**6), st.lists(st.integers(0, 3000), max_size=5))
def test_any_cut_gives_the_same_turns(drawn: list[int], start: int, counts: list[int]) -> None:
    mixture = Mixture(shares(len(drawn)), {0: drawn}, 7)
    whole = np.stack(mixture.at(np.arange(start, start + sum(counts))))
    cuts = np.cumsum([start, *counts])
    parts = [np.stack(mixture.at(np.arange(a, b))) for a, b in itertools.pairwise(cuts)]
    assert np.array_equal(whole, np.concatenate([np.empty((2, 0), int), *parts], axis=1))


def test_weights_change_where_they_are_told_to() -> None:
    mixture = Mixture(shares(2), {0: [1, 0], 3 * 64 - 5: [1, 3]}, 1)
    block = mixture.block
    sources, places = mixture.at(np.arange(7 * block))
    assert not sources[: 3 * block].any()
    assert (sources[3 * block :] == 1).sum() == 3 * block
    assert np.array_equal(places[sources == 0], np.arange(4 * block))


def test_a_source_is_read_as_often_as_it_may_be() -> None:
    mixture = Mixture(shares(2, epochs_0=4), {0: [1, 1]}, 1)
    block = mixture.block
    sources, places = mixture.at(np.arange(8000))
    used = (sources == 0).sum()
    assert 4 * 700 - block - 2 <= used <= 4 * 700  # to within a block
    assert places[sources == 0].max() == used - 1
    assert (sources[-block:] == 1).all()
    assert mixture.end is None


def test_the_end() -> None:
    mixture = Mixture(shares(2, epochs_0=4, epochs_1=8), {0: [1, 2]}, 1)
    block = mixture.block
    assert mixture.end is not None
    sources, _ = mixture.at(np.arange(mixture.end))
    for index, limit in ((0, 2800), (1, 5600)):
        assert limit - block <= (sources == index).sum() <= limit
    with pytest.raises(ValueError, match=f"must be below {mixture.end}"):
        mixture.at(np.array([mixture.end]))


def test_sources_take_turns_evenly() -> None:
    """Neighbouring turns are as independent as drawn ones."""
    sources, _ = Mixture(shares(2), {0: [1, 1]}, 1).at(np.arange(100_000))
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


@settings(deadline=None, max_examples=50)
@given(
    weights,
    st.lists(st.none() | st.integers(1, 3), min_size=9, max_size=9),
    st.integers(1, 5000),
    st.integers(-(2**40), 2**40),
)
def test_every_turn_is_found_again(drawn: list[int], epochs: list[int | None], change: int, seed: int) -> None:
    """`positions` is the inverse of `at`, over a change of weights and sources that are used up."""
    sources = [Share(str(index), 700, epochs[index]) for index in range(len(drawn))]
    mixture = Mixture(sources, {0: drawn, change: drawn[::-1]}, seed)
    last = 6000 if mixture.end is None else min(6000, mixture.end)
    chosen, numbers = mixture.at(np.arange(last))
    for index in range(len(drawn)):
        here = np.flatnonzero(chosen == index)[:40]
        assert np.array_equal(mixture.positions(index, numbers[here]), here)
        assert np.array_equal(np.sort(numbers[chosen == index]), np.arange((chosen == index).sum()))


def test_what_never_comes() -> None:
    mixture = Mixture(shares(2, epochs_0=1), {0: [1, 1]}, 1)
    used = mixture.phases[-1].drawn[0]
    assert mixture.positions(0, np.array([used - 1, used]))[1] == -1 < mixture.positions(0, np.array([used - 1]))[0]


def test_state_is_of_the_past() -> None:
    """What is told of the time before a position does not depend on what comes after it."""
    first = Mixture(shares(2), {0: [1, 1]}, 1)
    later = Mixture(shares(2), {0: [1, 1], 10_000: [1, 3]}, 1)
    assert first.state(9000) == later.state(9000) == first.state()
    assert later.state() != later.state(9000)
    assert later.state()[1] == [10_048, {"0": "1/4", "1": "3/4"}]
