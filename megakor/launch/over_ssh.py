"""Ranks on the hosts of a host file, which a launcher on this machine reaches by ssh: `deepspeed` with pdsh, or mpirun.

    host file ─► who can be reached ─► the slots that the layout takes ─► RUN/launch/hostfile ─► the launcher

With `launch.elastic=true` the run goes on without hosts that cannot be reached, at its start and at every restart.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys

from megakor.config.choices import ClusterKind
from megakor.config.schema import EngineConfig
from megakor.config.secrets import write_secrets
from megakor.launch.command import Command, check_plain_paths, deepspeed, program
from megakor.launch.environment import environment_file, rank_environment
from megakor.launch.folder import LaunchFolder
from megakor.launch.hosts import (
    Hosts,
    check_port,
    first_slots,
    host_file,
    include_of,
    left_over,
    ssh_options,
    unreachable,
)
from megakor.launch.launcher import Launcher
from megakor.launch.layout import configured_hosts
from megakor.logs import get_logger

log = get_logger(__name__)


class OverSsh(Launcher):
    """The hosts of a run.

    Raises:
        ValueError, OSError: the host file cannot be read or used, or a path would not survive a remote shell.
    """

    def __init__(self, config: EngineConfig, folder: LaunchFolder) -> None:
        self.cluster, self.folder, self.elastic = config.cluster, folder, config.launch.elastic
        if self.cluster.hostfile is None:
            raise ValueError(f"cluster.hostfile must be given with cluster.kind={self.cluster.kind.value}")
        check_plain_paths(folder.run)
        self.hosts = configured_hosts(self.cluster)
        self.there = self.hosts
        if len(self.hosts) > 1 and "localhost" in self.hosts:
            raise ValueError(
                f"cluster.hostfile={self.cluster.hostfile} must name hosts as all of them do, not localhost"
            )
        if self.cluster.kind is ClusterKind.openmpi and include_of(self.hosts):
            rule = "leave the first slots of each host: mpirun counts slots, and does not choose among them"
            raise ValueError(f"cluster.include={self.cluster.include}{self.cluster.exclude} must {rule}")
        write_secrets(folder.run, self.cluster.secrets, os.environ)

    def all_slots(self) -> int:
        """Slots of all hosts, reachable or not."""
        return sum(map(len, self.hosts.values()))

    def slots(self) -> int:
        """Slots of the hosts that can be reached now.

        Raises:
            ValueError: a host has fewer accelerators than slots, where it is this machine.
            OSError: a program is missing, the ranks' port is in use, or hosts cannot be reached and the run cannot go
                on without them.
        """
        if self.cluster.kind is ClusterKind.deepspeed:
            program("pdsh", "the `deepspeed` launcher starts remote processes with it (Debian: apt-get install pdsh)")
        self.check_devices()
        gone = unreachable(list(self.hosts))
        names = "; ".join(f"{host} ({why})" for host, why in gone.items())
        if len(gone) == len(self.hosts) or (gone and not self.elastic):
            rule = "" if self.elastic else "; launch.elastic=true goes on without them"
            raise ConnectionError(f"every host must be reachable by ssh without a password, unlike {names}{rule}")
        if gone:
            log.warning("not reachable, going on without: %s", names)
        self.there = {host: slots for host, slots in self.hosts.items() if host not in gone}
        check_port(self.master(), self.cluster.master_port)
        return sum(map(len, self.there.values()))

    def check_devices(self) -> None:
        """Raise where this machine is one of the hosts and has fewer accelerators than its slots."""
        here = ("localhost", "127.0.0.1", socket.gethostname())
        for host in (host for host in self.hosts if host in here):
            from megakor.train.device import num_slots  # imports torch and DeepSpeed

            wanted = max(self.hosts[host]) + 1
            if num_slots(wanted) < wanted:
                file = f"cluster.hostfile={self.cluster.hostfile}"
                raise ValueError(
                    f"{file}: slots={wanted} of {host} must be at most its {num_slots(wanted)} accelerators"
                )

    def master(self) -> str:
        """The address that ranks meet at: on the first host that is there."""
        first = next(iter(self.there))
        if self.cluster.master_address is not None and first == next(iter(self.hosts)):
            return self.cluster.master_address
        return first

    def command(self, num_ranks: int) -> Command:
        """The launcher's command for so many ranks, on the first slots that are there."""
        used = first_slots(self.there, num_ranks)
        idle = left_over(self.there, used)
        if idle:
            log.warning("idle: %s", idle)
        words = self.folder.write_config(num_ranks)
        file = str(self.folder.write("hostfile", host_file(used)))
        variables = rank_environment(self.cluster)
        if self.cluster.kind is ClusterKind.openmpi:
            return self.folder.keep(self.mpirun(used, file, variables, words))
        return self.folder.keep(self.deepspeed(used, file, variables, words))

    def deepspeed(self, used: Hosts, file: str, variables: dict[str, str], words: list[str]) -> Command:
        """`deepspeed` hands variables on from a file that we name, and reaches its first host, too, by pdsh."""
        environment = self.folder.write("environment", environment_file(variables))
        include = include_of(used)
        start = [deepspeed(), "--hostfile", file, *(["--include", include] if include else []), "--launcher", "pdsh",
                 "--force_multi", "--no_ssh_check", "--master_addr", self.master(),
                 "--master_port", str(self.cluster.master_port),
                 "--no_local_rank", "--log_level", "error", "--module"]  # fmt: skip
        ssh = {"PDSH_SSH_ARGS_APPEND": shlex.join(ssh_options()), "DS_ENV_FILE": str(environment)}
        return Command([*start, *words], ssh, without=self.cluster.secrets)

    def mpirun(self, used: Hosts, file: str, variables: dict[str, str], words: list[str]) -> Command:
        """`mpirun` of Open MPI; ranks learn their numbers from it (megakor/train/device.py)."""
        meeting = {"MASTER_ADDR": self.master(), "MASTER_PORT": str(self.cluster.master_port)}
        exports = [word for name, value in {**variables, **meeting}.items() for word in ("-x", f"{name}={value}")]
        interface = self.cluster.interface
        only = ["--mca", "oob_tcp_if_include", interface, "--mca", "btl_tcp_if_include", interface] if interface else []
        start = [program("mpirun", "it comes with Open MPI (Debian: apt-get install openmpi-bin)"), "--hostfile",
                 file, "-np", str(sum(map(len, used.values()))), "--map-by", "slot", "--bind-to", "none",
                 "--mca", "plm_rsh_args", shlex.join(ssh_options()), *only, *exports]  # fmt: skip
        return Command([*start, sys.executable, "-u", "-m", *words], without=self.cluster.secrets)
