"""Which rank is slow: each rank's own time in the forward passes of a step, side by side.

Every rank's step takes as long as the slowest one's, since they wait for each other; the time in the module's forward
pass does not, where no other rank is waited for within it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from deepspeed.accelerator import get_accelerator
from torch import nn

from megakor.train.device import is_cpu


class ForwardTimes:
    """Adds up the seconds that this rank spends in a module's forward passes while it trains.

    On an accelerator they are the device's, between two events in its stream, so nothing is waited for until `take`; on
    a CPU they are the wall clock's. Passes in evaluation mode are left out, and so is a pass within another one.
    Recomputation in the backward pass calls the blocks, not the module, and does not count.

    What the forward pass waits for counts: the ranks of a tensor or context group, or with ZeRO-3 of all replicas, wait
    for each other in it and come out alike. A pipeline's stages wait for each other between passes, which does not
    count, but they differ in their layers.

    Args:
        module: the rank's whole module, as it is handed to the engine.
    """

    def __init__(self, module: nn.Module) -> None:
        self.on_cpu = is_cpu()
        self.depth = 0
        self.start: Any = None
        self.seconds = 0.0
        self.events: list[tuple[Any, Any]] = []
        self.hooks = [
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after, always_call=True),  # also where the pass raises
        ]

    def _now(self) -> Any:
        if self.on_cpu:
            return time.perf_counter()
        event = get_accelerator().Event(enable_timing=True)
        event.record()
        return event

    def _before(self, module: nn.Module, *_: Any) -> None:
        self.depth += 1
        if self.depth == 1:
            self.start = self._now() if module.training else None

    def _after(self, *_: Any) -> None:
        self.depth -= 1
        if self.depth or self.start is None:
            return
        if self.on_cpu:
            self.seconds += time.perf_counter() - self.start
        else:
            self.events.append((self.start, self._now()))

    def take(self) -> float:
        """The seconds since the last call, between steps; waits for the device to have finished the passes."""
        if self.events:
            self.events[-1][1].synchronize()
            self.seconds += sum(start.elapsed_time(end) for start, end in self.events) / 1000  # from milliseconds
        seconds, self.seconds = self.seconds, 0.0
        self.events.clear()
        return seconds

    def close(self) -> None:
        """Leave the module as it was."""
        for hook in self.hooks:
            hook.remove()


def spread(seconds: Sequence[float]) -> dict[str, float | int]:
    """The ranks' forward seconds of a step, in order of rank, as fields of a metrics record."""
    return {
        "forward_seconds_min": min(seconds),
        "forward_seconds_median": statistics.median(seconds),
        "forward_seconds_max": max(seconds),
        "slowest_rank": max(range(len(seconds)), key=seconds.__getitem__),
    }
