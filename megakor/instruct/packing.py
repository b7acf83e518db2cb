"""Best-fit packing: lengths go in, rows come out, each length whole in one of them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The numbers of the lengths that share each row, so that no row's lengths add up to more than `capacity`.

    Best-fit decreasing: the longest goes first, into the fullest row that has room for it, else into a new one. At most
    11/9 of the fewest rows that are possible come out, and 4 (Johnson et al. 1974). The time is O(n log n): rows with
    equal room are kept together, so there are never more than `capacity` places to search.

    Raises:
        ValueError: a length is below 1 or above the capacity.
    """
    rows: list[list[int]] = []
    rooms: list[int] = []  # sorted, each once
    rows_of: dict[int, list[int]] = {}  # those that have so much room
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        if not 1 <= length <= capacity:
            raise ValueError(f"length={length} must be in 1 … {capacity}")
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[place]
            row = rows_of[room].pop()
            if not rows_of[room]:
                del rooms[place], rows_of[room]
        rows[row].append(number)
        left = room - length
        if left:
            if left not in rows_of:
                insort(rooms, left)
            rows_of.setdefault(left, []).append(row)
    return rows
