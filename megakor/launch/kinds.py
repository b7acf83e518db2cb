"""Which kinds of cluster are watched over from here, and which take a job and start it themselves."""

from __future__ import annotations

from megakor.config.choices import ClusterKind
from megakor.config.schema import EngineConfig
from megakor.launch.folder import LaunchFolder
from megakor.launch.kubernetes import kubernetes_job
from megakor.launch.launcher import Launcher
from megakor.launch.local import Local, OneNode
from megakor.launch.over_ssh import OverSsh
from megakor.launch.slurm import slurm_job

SUBMITTED = {ClusterKind.slurm: slurm_job, ClusterKind.kubernetes: kubernetes_job}
"""Kinds that take a job and start it themselves."""


def launcher_of(config: EngineConfig, folder: LaunchFolder) -> Launcher:
    """What starts a run's ranks from here, for the other kinds."""
    cluster = config.cluster
    if cluster.kind is ClusterKind.local:
        return Local(config, folder)
    return OverSsh(config, folder) if cluster.ssh else OneNode(config, folder)
