"""`megakor launch pretrain` and `megakor launch instruct`: a training verb on its machines, whatever starts it there.

resolved configuration ─► RUN/launch ─► the command of the cluster's kind ─► watched over, or submitted
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from megakor.cli import main
from megakor.config.choices import ClusterKind
from megakor.config.schema import LaunchInstructConfig, LaunchPretrainConfig
from megakor.launch.command import Command, program
from megakor.launch.folder import LaunchFolder
from megakor.launch.kubernetes import kubernetes_job
from megakor.launch.launcher import Launcher
from megakor.launch.local import Local, OneNode
from megakor.launch.over_ssh import OverSsh
from megakor.launch.slurm import slurm_job
from megakor.launch.supervisor import Supervisor
from megakor.logs import get_logger

log = get_logger(__name__)

SUBMITTED = {ClusterKind.slurm: slurm_job, ClusterKind.kubernetes: kubernetes_job}
"""Kinds that take a job and start it themselves."""


def launcher_of(config: LaunchPretrainConfig | LaunchInstructConfig, folder: LaunchFolder) -> Launcher:
    """What starts the run's ranks from here."""
    cluster = config.cluster
    if cluster.kind is ClusterKind.local:
        return Local(config, folder)
    return OverSsh(config, folder) if cluster.ssh else OneNode(config, folder)


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


def run(config: LaunchPretrainConfig | LaunchInstructConfig) -> None:
    """Start the run, and start it again as `launch` says; or, with `dry_run`, print what would run."""
    folder = LaunchFolder(config)
    with folder.locked(), redirect_stdout(sys.stderr):  # where DeepSpeed, once imported, prints and logs to
        if config.cluster.kind in SUBMITTED:
            commands = SUBMITTED[config.cluster.kind](config, folder, os.environ)
            if not config.dry_run:
                submit(commands)
        else:
            launcher = launcher_of(config, folder)
            slots = launcher.all_slots if config.dry_run else launcher.slots
            supervisor = Supervisor(config, launcher.command, slots)
            if config.dry_run:
                commands = launcher.commands(supervisor.world_size())
            else:
                record = supervisor.supervise()
                why = f" ({record.reason})" if record.reason else ""
                log.info("run=%s: %s after step %d%s", config.run, record.outcome, record.step, why)
    if config.dry_run:
        print(*commands, sep="\n")


if __name__ == "__main__":
    main(["launch", *sys.argv[1:]])
