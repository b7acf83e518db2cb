"""Packing of lengths into rows: every length once, no row too long, and few rows."""

from __future__ import annotations

import math
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakor.instruct.packing import pack


@given(st.data())
def test_every_length_is_in_one_row_that_has_room(data: st.DataObject) -> None:
    capacity = data.draw(st.integers(1, 60))
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    rows = pack(lengths, capacity)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    sums = [sum(lengths[number] for number in row) for row in rows]
    assert all(0 < total <= capacity for total in sums)
    assert len(rows) <= 11 / 9 * math.ceil(2 * sum(lengths) / capacity) + 4  # twice the volume is room for any of them
    assert pack(lengths, capacity) == rows


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The same by looking at every row; of equally full rows the last to become so takes the next."""
    rows: list[list[int]] = []
    touched: list[tuple[int, int]] = []  # room, when
    for turn, number in enumerate(sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))):
        fitting = [(room, -when, row) for row, (room, when) in enumerate(touched) if room >= lengths[number]]
        if fitting:
            room, _, row = min(fitting)
        else:
            room, row = capacity, len(rows)
            rows.append([])
            touched.append((capacity, 0))
        rows[row].append(number)
        touched[row] = (room - lengths[number], turn)
    return rows


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.lists(st.integers(1, n), max_size=60), st.just(n))))
def test_it_is_best_fit_decreasing(case: tuple[list[int], int]) -> None:
    assert pack(*case) == best_fit_decreasing(*case)


def first_fit(lengths: list[int], capacity: int) -> int:
    """How many rows the lengths take in their own order, each in the first row with room."""
    rooms: list[int] = []
    for length in lengths:
        place = next((index for index, room in enumerate(rooms) if room >= length), len(rooms))
        rooms[place:] = [(rooms[place] if place < len(rooms) else capacity) - length, *rooms[place + 1 :]]
    return len(rooms)


@pytest.mark.parametrize("mean", [20, 80, 150])
def test_rows_are_fuller_than_by_first_fit(mean: int) -> None:
    for seed in range(20):
        generator = random.Random(seed)
        lengths = [min(256, 1 + int(generator.expovariate(1 / mean))) for _ in range(300)]
        rows = len(pack(lengths, 256))
        assert math.ceil(sum(lengths) / 256) <= rows <= first_fit(lengths, 256)


def test_an_example() -> None:
    assert pack([4, 6, 3, 10, 1, 6], 10) == [[3], [1, 2, 4], [5, 0]]
    assert pack([], 10) == []


@pytest.mark.parametrize("length", [0, 11])
def test_lengths_that_no_row_holds_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"length={length} must be in 1 … 10")):
        pack([3, length], 10)
