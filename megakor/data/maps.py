"""Memory maps that are open, the least recently used of which are closed to make room for others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np

MAX_OPEN = 256  # each holds a file descriptor; processes are commonly allowed 1,024


class Maps:
    """Open maps by key: at most `MAX_OPEN`, and at most `max_bytes` besides the one that was asked for last.

    Args:
        max_bytes: of those that are counted by bytes.
    """

    def __init__(self, max_bytes: int = 0) -> None:
        self.max_bytes = max_bytes
        self._open: OrderedDict[Hashable, tuple[np.ndarray, int]] = OrderedDict()
        self._num_bytes = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._open

    def get(self, key: Hashable) -> np.ndarray | None:
        """An open map; None if it is not."""
        if key not in self._open:
            return None
        self._open.move_to_end(key)
        return self._open[key][0]

    def add(self, key: Hashable, num_bytes: int, opened: Callable[[], np.ndarray]) -> np.ndarray:
        """`opened()`, kept; others are closed before, so that it finds their room.

        Args:
            num_bytes: that it counts for; 0 where only its descriptor does.
        """
        while self._open and (len(self._open) >= MAX_OPEN or self._num_bytes + num_bytes > self.max_bytes > 0):
            self._num_bytes -= self._open.popitem(last=False)[1][1]
        tokens = opened()
        self._open[key] = tokens, num_bytes
        self._num_bytes += num_bytes
        return tokens
