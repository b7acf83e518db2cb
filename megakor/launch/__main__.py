"""`megakor launch pretrain` and `megakor launch instruct`: a training verb under the launcher, watched over."""

from __future__ import annotations

import sys
from functools import partial

from megakor.cli import main
from megakor.config.schema import InstructConfig, PretrainConfig
from megakor.launch.command import launched
from megakor.launch.supervisor import Supervisor
from megakor.logs import get_logger
from megakor.train.device import num_slots

log = get_logger(__name__)


def run(config: PretrainConfig | InstructConfig) -> None:
    """Start the run, and start it again as `launch` says; what was given on the command line goes to every rank."""
    verb = "instruct" if isinstance(config, InstructConfig) else "pretrain"
    command = partial(launched, verb, overrides=sys.argv[1:])
    record = Supervisor(config, command, lambda: num_slots(config.launch.num_ranks)).supervise()
    why = f" ({record.reason})" if record.reason else ""
    log.info("run=%s: %s after step %d%s", config.run, record.outcome, record.step, why)


if __name__ == "__main__":
    main(["launch", *sys.argv[1:]])
