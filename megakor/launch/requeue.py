"""Whether a batch job is put into the queue again: asked by the batch script when its run has ended.

    exit record, status ─► finished, or stopped by a person: 0
                           stopped by Slurm's notice, or failed as `launch.restarts` allows: 75
                           failed so that no start helps: 1

Failures of a job are kept in RUN/launch/failures.json from one start to the next, and judged by the supervisor's rule.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megakor.files import atomic_write
from megakor.launch.supervisor import Failure, given_up, how_it_ended, num_starts
from megakor.logs import get_logger

log = get_logger(__name__)

FAILURES = "failures.json"
DONE, AGAIN, GIVEN_UP = 0, 75, 1
"""Exit statuses; 75 is the system's word for what may succeed later (sysexits.h)."""


@dataclass
class History:
    """What is known of a job's starts.

    Attributes:
        starts: how often the run had begun when this was written.
        failures: how the starts of this job ended that failed, oldest first.
    """

    starts: int = 0
    failures: list[Failure] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, first: bool) -> History:
        """The history in a file; a job's first start has no failures before it."""
        if not path.is_file():
            return cls()
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return cls(kept["starts"], [] if first else [Failure(**failure) for failure in kept["failures"]])

    def save(self, path: Path) -> None:
        """Replace the file."""
        with atomic_write(path) as file:
            file.write((json.dumps(asdict(self), ensure_ascii=False) + "\n").encode())


def decide(run: Path, status: int, noticed: bool, restarts: int, first: bool) -> int:
    """The exit status that tells what is to be done.

    Args:
        run: run folder.
        status: the launcher's exit status.
        noticed: whether Slurm gave notice, so that the run was asked to stop.
        restarts: how many failures are made good.
        first: whether this was the job's first start.
    """
    path = run / "launch" / FAILURES
    history = History.load(path, first)
    record, failure = how_it_ended(run, status, history.starts, world_size=0)
    history.starts = num_starts(run)
    if failure is not None:
        history.failures.append(failure)
    history.save(path)
    if record is not None:
        again = noticed and record.outcome == "stopped"
        log.info("run=%s: %s after step %d%s", run, record.outcome, record.step, "; requeued" if again else "")
        return AGAIN if again else DONE
    assert failure is not None
    why = given_up(history.failures, restarts)
    if why is not None:
        log.error("run=%s: %s", run, why)
        return GIVEN_UP
    log.error("run=%s: failed %s, requeued: %s", run, failure.where, failure.reason)
    return AGAIN


def main() -> None:
    """`python -m megakor.launch.requeue RUN --status N --noticed true`: ends with the status of `decide`."""
    parser = argparse.ArgumentParser(description="Whether a batch job is put into the queue again: 75 where it is.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--status", type=int, required=True, help="exit status of the launcher")
    parser.add_argument("--noticed", choices=("true", "false"), required=True, help="whether Slurm gave notice")
    given = parser.parse_args()
    restarts = OmegaConf.load(given.run / "launch" / "config.yaml").launch.restarts
    first = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
    raise SystemExit(decide(given.run, given.status, given.noticed == "true", restarts, first))


if __name__ == "__main__":
    main()
