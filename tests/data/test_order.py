from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakor.data.order import ORDER_VERSION, SourceOrder

GOLDEN_SMALL = [[0, 2, 4], [0, 0, 0], [1, 3, 0], [1, 2, 3]]
GOLDEN_LARGE = [[0, 0, 1, 1000000], [95939, 74412, 20827, 95821], [8181, 8059, 372, 913], [4, 62, 40, 40]]

shards = st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(any)
orders = st.builds(
    lambda sizes, seed, streams, window: SourceOrder(
        np.array(sizes), seed=seed, name="위키", num_streams=streams, window=window
    ),
    shards, st.integers(-(2**70), 2**70), st.integers(1, 70), st.integers(1, 100),
)  # fmt: skip


def identities(order: SourceOrder, start: int, count: int) -> np.ndarray:
    """(epoch, shard, sample) of each position: [count, 3]."""
    places = order.at(np.arange(start, start + count))
    return np.stack([places.epochs, places.shards, places.samples], axis=1)


def test_golden() -> None:
    """These numbers decide which data a resumed run sees: a change needs a new ORDER_VERSION."""
    assert ORDER_VERSION == 2
    order = SourceOrder(np.array([3, 0, 5, 4]), seed=1234, name="", num_streams=2, window=3)
    assert identities(order, 10, 4).tolist() == GOLDEN_SMALL
    places = SourceOrder(np.full(100_000, 10_000), seed=-7, name="web", num_streams=64).at(
        np.array([0, 999_999_999, 10**9, 10**15 + 7])
    )
    assert [values.tolist() for values in vars(places).values()] == GOLDEN_LARGE


@settings(deadline=None, max_examples=60)
@given(orders, st.integers(0, 10**9))
def test_every_epoch_has_every_sample_once(order: SourceOrder, epoch: int) -> None:
    found = identities(order, epoch * order.num_samples, order.num_samples)
    expected = [(epoch, shard, sample) for shard, n in enumerate(order.samples_of_shards) for sample in range(n)]
    assert sorted(map(tuple, found.tolist())) == expected


@settings(deadline=None, max_examples=60)
@given(orders, st.integers(0, 10**6), st.lists(st.integers(0, 150), max_size=8))
def test_any_cut_gives_the_same_order(order: SourceOrder, start: int, counts: list[int]) -> None:
    whole = identities(order, start, sum(counts))
    starts = np.cumsum([start, *counts]).tolist()
    parts = [identities(order, first, count) for first, count in zip(starts, counts, strict=False)]
    assert np.array_equal(whole, np.concatenate([np.empty((0, 3), np.int64), *parts]))


@settings(deadline=None, max_examples=60)
@given(orders, st.integers(0, 10**6))
def test_the_way_back(order: SourceOrder, start: int) -> None:
    positions = np.arange(start, start + 100)
    places = order.at(positions)
    assert np.array_equal(order.positions(places.epochs, places.shards, places.samples), positions)


@settings(deadline=None, max_examples=60)
@given(orders, st.integers(0, 10**6))
def test_streams_take_turns_and_keep_to_their_shards(order: SourceOrder, epoch: int) -> None:
    """In every round each stream has one turn, and a stream reads a run of the epoch's line of shards."""
    positions = np.arange(epoch * order.num_samples, (epoch + 1) * order.num_samples)
    places = order.at(positions)
    rounds = np.split(places.streams, range(order.num_streams, len(positions), order.num_streams))
    assert all(sorted(turns.tolist()) == list(range(len(turns))) for turns in rounds)
    read = [len(set(places.shards[places.streams == stream].tolist())) for stream in range(order.num_streams)]
    assert sum(read) <= (order.samples_of_shards > 0).sum() + order.num_streams - 1  # one more at each border


def test_a_window_bounds_what_is_read() -> None:
    """While a stream gets through a window, it reads the shards of that window alone."""
    order = SourceOrder(np.full(36, 100), seed=1, name="", num_streams=2, window=300)
    places = order.at(np.arange(order.num_samples))
    for stream in range(2):
        windows = places.shards[places.streams == stream].reshape(-1, 300)
        assert [len(set(window.tolist())) for window in windows] == [3] * 6


def test_shuffled_evenly() -> None:
    """Neighbours, places and epochs are as independent as in a true shuffle, within 5 standard deviations."""
    n = 20_000

    def samples(seed: int, start: int) -> np.ndarray:
        order = SourceOrder(np.full(20, 1000), seed=seed, name="", num_streams=4, window=5000)
        return order.at(np.arange(start, start + n)).samples  # shards are too few to say anything about

    limit = 5 / np.sqrt(n)
    first, second, other = samples(1, 0), samples(1, n), samples(2, 0)
    for left, right in ((first, second), (first, other), (first[:-1], first[1:]), (first, np.arange(n))):
        assert abs(np.corrcoef(left, right)[0, 1]) < limit


def test_small_batches_draw_from_the_whole_line() -> None:
    """Batches of half as many samples as there are streams are no more from one half of the line than drawn ones."""
    order = SourceOrder(np.array([64 * 100]), seed=1, num_streams=64)
    halves = (order.at(np.arange(6400)).streams < 32).reshape(-1, 32).mean(axis=1)
    assert halves.std() < 0.12  # of drawn ones 0.06; in the streams' own order 0.5


def test_sources_are_shuffled_differently() -> None:
    names = ("뉴스", "위키")
    first, second = (identities(SourceOrder(np.array([500]), seed=1, name=name), 0, 500)[:, 2] for name in names)
    assert (first == second).mean() < 0.02


@pytest.mark.parametrize(("sizes", "changes", "message"), [
    ([0], {}, "num_samples=0"),
    ([5], {"num_streams": 0}, "num_streams=0 must be at least 1"),
    ([5], {"window": 0}, "window=0 must be at least 1"),
])  # fmt: skip
def test_bad_input(sizes: list[int], changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceOrder(np.array(sizes), seed=1, **changes)
