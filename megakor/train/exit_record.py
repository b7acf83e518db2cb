"""How a run ended: one small file in its folder, which whoever supervises the run reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megakor.files import atomic_write

FILE = "exit.json"


@dataclass(frozen=True)
class ExitRecord:
    """The end of a run.

    Attributes:
        outcome: finished; stopped, as it was asked to; failed. A run that was killed leaves no record.
        reason: what asked it to stop, or the error.
        step: optimizer steps done.
        checkpoint: name of the newest checkpoint that this start saved; None: none.
        world_size: ranks.
    """

    outcome: str
    reason: str
    step: int
    checkpoint: str | None
    world_size: int

    def write(self, run: Path) -> None:
        """Replace the run's record."""
        with atomic_write(run / FILE) as file:
            file.write((json.dumps(asdict(self), ensure_ascii=False) + "\n").encode())


def remove_exit(run: Path) -> None:
    """A run that goes on has not ended."""
    (run / FILE).unlink(missing_ok=True)


def read_exit(run: Path) -> ExitRecord | None:
    """How a run ended last; None when it goes on, or was killed. ValueError when the file holds something else."""
    try:
        return ExitRecord(**json.loads((run / FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{run / FILE}: must be a run's exit record: {error}") from None
