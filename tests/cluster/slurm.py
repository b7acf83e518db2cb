"""A real Slurm on the hosts of a cluster: munged and slurmd on each, slurmctld on the first."""

from __future__ import annotations

import secrets

from tests.cluster.hosts import Cluster, Host, wait_for

CONFIGURATION = """\
ClusterName=cluster
SlurmctldHost=node-1
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
SlurmdTimeout=5
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName={nodes} CPUs=2 State=UNKNOWN
PartitionName=spare Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""
"""Jobs of the partition `urgent` take nodes from those in `spare`, whose batch script gets the signal that it asked for
and has a minute until it is ended and queued again."""

MUNGED = "mkdir /run/munge && munged --force --key-file={folder}/munge.key --log-file={folder}/munged-$(hostname).log"


class Slurm:
    """Slurm, up on all hosts of a cluster when this returns; it ends with them."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.folder = cluster, cluster.folder / "slurm"
        (self.folder / "state").mkdir(parents=True)
        self.configuration = self.folder / "slurm.conf"
        self.configuration.write_text(CONFIGURATION.format(folder=self.folder, nodes=",".join(cluster.addresses)))
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        for host in cluster:
            self._on(host, "sh", "-c", MUNGED.format(folder=self.folder))
        self("slurmctld")
        for host in cluster:
            self._on(host, "slurmd")
        wait_for(lambda: set(self("sinfo", "--noheader", "--format=%T").split()) == {"idle"}, 30, every=0.2)

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to find it."""
        return {"SLURM_CONF": str(self.configuration)}

    def __call__(self, *command: str) -> str:
        """What a command says on the first host. AssertionError when it fails."""
        return self._on(self.cluster[1], *command)

    def job(self, number: int) -> dict[str, str]:
        """What Slurm knows of a job, by its names for it."""
        told = self("scontrol", "--oneliner", "show", "job", str(number))
        return dict(word.split("=", maxsplit=1) for word in told.split() if "=" in word)

    def _on(self, host: Host, *command: str) -> str:
        done = host.run(*command, env=self.environment)
        assert done.returncode == 0, done.stderr
        return done.stdout
