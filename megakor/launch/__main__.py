"""`megakor launch pretrain`, `instruct` and `preflight`: many ranks on their machines, whatever starts them there.

resolved configuration ─► RUN/launch ─► the command of the cluster's kind ─► watched over, or submitted
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from megakor.cli import main
from megakor.config.schema import LaunchInstructConfig, LaunchPreflightConfig, LaunchPretrainConfig
from megakor.launch.command import Command, program
from megakor.launch.folder import LaunchFolder
from megakor.launch.kinds import SUBMITTED, launcher_of
from megakor.launch.supervisor import Supervisor
from megakor.logs import get_logger

log = get_logger(__name__)


def submit(commands: Sequence[Command]) -> None:
    """Hand a job to what starts it. OSError where that is not there, or refuses it."""
    for command in commands:
        program(command.words[0], "it takes the job; --dry-run writes the files without it")
        log.info("$ %s", command)
        done = subprocess.run(
            command.words, env=command.full_environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise OSError(f"{command}: exit status {done.returncode} must be 0: {done.stderr.strip()}")
        log.info("%s", done.stdout.strip())


def run(config: LaunchPretrainConfig | LaunchInstructConfig | LaunchPreflightConfig) -> None:
    """Start the verb, and start a run again as `launch` says; or, with `dry_run`, print what would run."""
    folder, kind = LaunchFolder(config), config.cluster.kind
    with folder.locked(), redirect_stdout(sys.stderr):  # where DeepSpeed, once imported, prints and logs to
        if kind in SUBMITTED:
            if isinstance(config, LaunchPreflightConfig):
                rule = "be one whose ranks start from here; a job checks its own nodes with launch.preflight=true"
                raise ValueError(f"cluster.kind={kind.value} must {rule}")
            commands = SUBMITTED[kind](config, folder, os.environ)
            if not config.dry_run:
                submit(commands)
        else:
            launcher = launcher_of(config, folder)
            slots = launcher.all_slots if config.dry_run else launcher.slots
            supervisor = Supervisor(config, launcher.command, slots)
            if config.dry_run:
                commands = launcher.commands(supervisor.world_size())
            elif isinstance(config, LaunchPreflightConfig):
                check(launcher.command(supervisor.world_size()))
            else:
                record = supervisor.supervise()
                why = f" ({record.reason})" if record.reason else ""
                log.info("run=%s: %s after step %d%s", config.run, record.outcome, record.step, why)
    if config.dry_run:
        print(*commands, sep="\n")


def check(command: Command) -> None:
    """Run a preflight, whose table goes to standard output. SystemExit with its status when there is a fault."""
    log.info("$ %s", command)
    status = subprocess.run(command.words, env=command.full_environment(), check=False).returncode
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    main(["launch", *sys.argv[1:]])
