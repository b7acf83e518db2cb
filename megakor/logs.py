"""Logging and progress: what a person sees of a verb while it runs.

Records of every logger under `megakor` go to standard error; only rank 0 (environment variable `RANK`) speaks at INFO,
the others from WARNING on, with their rank in front. `progress` is a bar on a terminal and a plain line every few
seconds elsewhere, so that a log file stays readable.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

PLAIN_INTERVAL = 5.0  # seconds between two plain lines of one progress


def rank() -> int:
    """This process's rank, as its launcher has set it; 0 without a launcher."""
    return int(os.environ.get("RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)


class _Handler(logging.Handler):
    """Writes to the standard error of the moment, above any bar that is on it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        where = f"rank {rank()}: " if rank() else ""
        return f"{self.formatTime(record, '%H:%M:%S')} {where}{level}{super().format(record)}"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module (pass `__name__`), under `megakor`."""
    root = logging.getLogger("megakor")
    if not any(isinstance(handler, _Handler) for handler in root.handlers):
        handler = _Handler()
        handler.setFormatter(_Formatter())
        root.addHandler(handler)
        root.propagate = False
        root.setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    return logging.getLogger(name if name.split(".")[0] == "megakor" else f"megakor.{name}")


class Progress(Generic[Item]):
    """An iterator over `iterable`, or a context manager with `update(n)`; see `progress`."""

    def __init__(self, iterable: Iterable[Item] | None, total: float | None, unit: str, description: str) -> None:
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)  # type: ignore[arg-type]
        self.iterable = iterable
        self.total = total
        self.unit = unit
        self.description = description
        self.count: float = 0
        self.start = self.last_line = time.monotonic()
        self.closed = False
        self.bar: tqdm | None = None
        self.silent = rank() != 0
        if not self.silent and sys.stderr.isatty():
            self.bar = tqdm(total=total, unit=unit, desc=description, unit_scale=unit == "B", dynamic_ncols=True)

    def update(self, n: float = 1) -> None:
        """Count `n` more units."""
        self.count += n
        if self.bar is not None:
            self.bar.update(n)
        elif time.monotonic() - self.last_line >= PLAIN_INTERVAL:
            self._write_line()

    def close(self) -> None:
        """End the bar, or write the last line."""
        if self.closed:
            return
        self.closed = True
        if self.bar is not None:
            self.bar.close()
        else:
            self._write_line()

    def _write_line(self) -> None:
        self.last_line = time.monotonic()
        if self.silent:
            return
        seconds = self.last_line - self.start
        scaled = self.unit == "B"
        count = tqdm.format_sizeof(self.count) if scaled else f"{self.count:,}"
        line = f"{self.description}: {count}" if self.description else count
        if self.total:
            total = tqdm.format_sizeof(self.total) if scaled else f"{self.total:,}"
            line += f" of {total} {self.unit} ({self.count / self.total:.0%})"
        else:
            line += f" {self.unit}"
        line += f" in {seconds:.1f} s"
        if self.total and 0 < self.count < self.total and not self.closed:
            line += f", {seconds * (self.total - self.count) / self.count:.0f} s left"
        get_logger("progress").info("%s", line)

    def __iter__(self) -> Iterator[Item]:
        assert self.iterable is not None, "iterate over progress(iterable); without one use update()"
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def __enter__(self) -> Progress[Item]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def progress(
    iterable: Iterable[Item] | None = None, *, total: float | None = None, unit: str = "", description: str = ""
) -> Progress[Item]:
    """Show how far something is: `for x in progress(xs, …)`, or `with progress(total=…) as bar: bar.update(n)`.

    A bar on a terminal; elsewhere a plain line every few seconds and one at the end. Unit `B` is scaled (k, M, G).
    Ranks other than 0 show nothing.
    """
    return Progress(iterable, total, unit, description)
