"""Slurm: one batch script, which asks for the nodes, starts one task on each, and puts itself into the queue again.

sbatch RUN/launch/job.sh ─► srun, a task a node ─► torchrun or `deepspeed --no_ssh` ─► ranks
its time runs out ─► USR1 ─► RUN/STOP ─► saved ─► megakor/launch/requeue.py ─► scontrol requeue
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from megakor.config.schema import EngineConfig
from megakor.config.secrets import write_secrets
from megakor.launch.command import Command, check_plain_paths
from megakor.launch.environment import rank_environment
from megakor.launch.folder import LaunchFolder, rendered
from megakor.launch.layout import nodes_and_ranks
from megakor.launch.requeue import FAILURES, History
from megakor.launch.supervisor import num_starts


def sbatch_options(config: EngineConfig, nodes: int, ranks: int) -> list[str]:
    """The options that stand at the head of the script."""
    slurm = config.cluster.slurm
    asked = {"partition": slurm.partition, "account": slurm.account, "time": slurm.time_limit}
    gpus = [f"--gres={slurm.accelerator}:{ranks}"] if slurm.accelerator else []
    return [
        f"--job-name={shlex.quote(config.name)}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        *gpus,
        *(f"--{name}={value}" for name, value in asked.items() if value is not None),
        *slurm.options,
    ]


def slurm_job(config: EngineConfig, folder: LaunchFolder, environment: Mapping[str, str]) -> list[Command]:
    """Write the batch script; the command that submits it.

    Raises:
        ValueError: the nodes' ranks are not given, the layout does not fill them, or a path would not survive a shell.
    """
    check_plain_paths(folder.run)
    nodes, ranks = nodes_and_ranks(config.cluster, config.parallel)
    write_secrets(folder.run, config.cluster.secrets, environment)
    History(num_starts(folder.run)).save(folder.path / FAILURES)
    slurm = config.cluster.slurm
    script = rendered(
        "slurm.sh.jinja",
        options=sbatch_options(config, nodes, ranks),
        nodes=nodes,
        ranks=ranks,
        notice_seconds=slurm.notice_seconds,
        launcher=slurm.node_launcher.value,
        run=folder.run,
        working_folder=Path.cwd(),
        python=sys.executable,
        port=config.cluster.master_port,
        environment={name: shlex.quote(value) for name, value in rank_environment(config.cluster, environment).items()},
        words=shlex.join(folder.write_config(nodes * ranks)),
    )
    return [folder.keep(Command(["sbatch", str(folder.write("job.sh", script))]))]
