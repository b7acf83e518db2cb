"""What a run has left out of its stream by itself, after a loss spike: kept with it, so that a resume repeats it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megakor.files import atomic_write

FILE = "skips.json"


@dataclass(frozen=True)
class Skip:
    """One roll-back.

    Attributes:
        step: at which the spike was, from 1.
        rolled_back_to: step of the checkpoint that the run went on from.
        stretches: of the stream, as `data.skip`.
        why: in words.
    """

    step: int
    rolled_back_to: int
    stretches: list[list[int]]
    why: str


def read_skips(run: Path) -> list[Skip]:
    """What a run has left out so far. ValueError when its file holds something else."""
    try:
        return parse_skips((run / FILE).read_bytes(), run / FILE)
    except FileNotFoundError:
        return []


def parse_skips(content: bytes, where: object) -> list[Skip]:
    """The list in a file's content. ValueError naming `where` when it is something else."""
    try:
        return [Skip(**entry) for entry in json.loads(content)]
    except (TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: must be a run's list of what it has left out: {error}") from None


def add_skip(run: Path, skip: Skip) -> None:
    """Add one to the run's list."""
    with atomic_write(run / FILE) as file:
        entries = [asdict(entry) for entry in (*read_skips(run), skip)]
        file.write(json.dumps(entries, ensure_ascii=False, indent=1).encode())


def merged(*lists: Iterable[Sequence[int]]) -> list[list[int]]:
    """Stretches of all lists, in order; those that touch or overlap become one."""
    result: list[list[int]] = []
    for start, stop in sorted((first, last) for stretches in lists for first, last in stretches):
        if result and start <= result[-1][1]:
            result[-1][1] = max(result[-1][1], stop)
        else:
            result.append([start, stop])
    return result


def stretches(positions: np.ndarray) -> list[list[int]]:
    """Positions as `data.skip` names them: [first, one after the last] of each stretch without a gap.

    Those of a step have a gap where a stretch is skipped already.
    """
    positions = np.sort(positions)
    pieces = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
    return [[int(piece[0]), int(piece[-1]) + 1] for piece in pieces]
