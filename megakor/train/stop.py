"""Stopping a run from outside: by a file, or by a signal to any of its ranks.

A request is only noted here. The step loop hears of it at the next step boundary, on all ranks, saves and ends.
"""

from __future__ import annotations

import os
import signal
import threading
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

from megakor.logs import get_logger

log = get_logger(__name__)

STOP = "STOP"
"""Name of the file in the run folder."""


class Reason(IntEnum):
    """Why a run is to stop."""

    none = 0
    file = 1
    sigterm = 2
    sigusr1 = 3

    def __str__(self) -> str:
        return {"file": f"the file {STOP}", "none": "nothing"}.get(self.name, self.name.upper())


SIGNALS = {signal.SIGTERM: Reason.sigterm, signal.SIGUSR1: Reason.sigusr1}


class StopRequest:
    """Whether this rank was asked to stop; a context manager, for the main thread.

    A second signal ends the process at once: a checkpoint that is being written is then absent, earlier ones are whole.
    The launcher `deepspeed` passes SIGTERM on and kills after 30 s; it dies of SIGUSR1 itself. For longer steps the
    file is the way.

    Args:
        run: run folder.
        looks: whether this rank looks for the file; one rank is enough.
    """

    def __init__(self, run: Path, looks: bool) -> None:
        self._file, self._looks = run / STOP, looks
        self._signal = Reason.none
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def reason(self) -> Reason:
        """Asked at every step boundary."""
        if self._signal is Reason.none and self._looks and self._file.exists():
            return Reason.file
        return self._signal

    def take_back(self) -> None:
        """Remove the file, when it has been heeded: the next start must not stop at once."""
        if self._looks:
            self._file.unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not Reason.none:
            os._exit(128 + number)
        self._signal = SIGNALS[signal.Signals(number)]
