"""Ranks on this machine, or on this node of several: each by one command, which reaches no other machine.

Local     `deepspeed --num_gpus N`
OneNode   the same command on every node, each with its own cluster.node_rank: torchrun, or `deepspeed --no_ssh`
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from megakor.config.choices import ClusterKind
from megakor.config.schema import EngineConfig
from megakor.launch.command import Command, deepspeed, launched, torchrun
from megakor.launch.environment import rank_environment
from megakor.launch.folder import LaunchFolder, own_folder
from megakor.launch.hosts import check_port, host_file, include_of
from megakor.launch.launcher import Launcher
from megakor.launch.layout import all_filled


def beyond_ours(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that this process does not have, or has otherwise."""
    return {name: value for name, value in variables.items() if os.environ.get(name) != value}


class Local(Launcher):
    """The ranks of this machine, under the `deepspeed` launcher."""

    def __init__(self, config: EngineConfig, folder: LaunchFolder) -> None:
        self.config, self.folder = config, folder

    def slots(self) -> int:
        """Ranks that there is room for."""
        from megakor.train.device import num_slots  # imports torch and DeepSpeed

        return num_slots(self.config.launch.num_ranks)

    def command(self, num_ranks: int) -> Command:
        """The command for so many ranks. OSError when the launcher is not there."""
        _, *arguments = self.folder.write_config(num_ranks)
        words = launched(self.folder.verb, num_ranks, arguments)
        return self.folder.keep(Command(words, beyond_ours(rank_environment(self.config.cluster))))


class OneNode(Launcher):
    """One node's ranks. All nodes are given the same command line but for `cluster.node_rank`.

    Raises:
        ValueError: the nodes or the address of the first are not known, or the layout would leave slots idle.
    """

    def __init__(self, config: EngineConfig, folder: LaunchFolder) -> None:
        self.cluster, self.folder = config.cluster, folder
        self.hosts = all_filled(self.cluster, config.parallel)
        self.num_ranks = sum(map(len, self.hosts.values()))
        first = next(iter(self.hosts)) if self.cluster.hostfile is not None else None
        here = "127.0.0.1" if len(self.hosts) == 1 else None
        address = self.cluster.master_address or first or here
        if address is None:
            raise ValueError(f"cluster.master_address must be given with {len(self.hosts)} nodes and no host file")
        self.address = address
        node, last = self.cluster.node_rank, len(self.hosts) - 1
        if node is not None and node > last:
            raise ValueError(f"cluster.node_rank={node} must be at most {last}: there are {last + 1} nodes")

    def slots(self) -> int:
        """Ranks of all nodes, which must all be started.

        Raises:
            ValueError: it is not said which node this is.
            OSError: the ranks' port is in use, where they meet on this machine.
        """
        if self.cluster.node_rank is None and len(self.hosts) > 1:
            rule = f"must be given on every node, 0 to {len(self.hosts) - 1}; --dry-run shows the command of each"
            raise ValueError(f"cluster.node_rank {rule}")
        if self.cluster.node_rank in (None, 0):
            check_port(self.address, self.cluster.master_port)
        return self.num_ranks

    def command(self, num_ranks: int) -> Command:
        """This node's command."""
        assert num_ranks == self.num_ranks
        return self.of_node(self.cluster.node_rank or 0)

    def all_slots(self) -> int:
        """Ranks of all nodes."""
        return self.num_ranks

    def commands(self, num_ranks: int) -> list[Command]:
        """This node's command, or where it is not said which it is, those of all of them."""
        assert num_ranks == self.num_ranks
        node = self.cluster.node_rank
        return [self.of_node(rank) for rank in (range(len(self.hosts)) if node is None else [node])]

    def of_node(self, node: int) -> Command:
        """The command of a node; its files lie in a folder of their own, so that no two nodes write one file."""
        below = own_folder(node)
        words = self.folder.write_config(self.num_ranks, below)
        port = str(self.cluster.master_port)
        variables = rank_environment(self.cluster)
        if self.cluster.kind is ClusterKind.deepspeed:
            path = self.folder.write(f"{below}/hostfile", host_file(self.hosts))
            include = include_of(self.hosts)
            start = [deepspeed(), "--hostfile", str(path), *(["--include", include] if include else []), "--no_ssh",
                     "--node_rank", str(node), "--master_addr", self.address, "--master_port", port,
                     "--no_local_rank", "--log_level", "error", "--module"]  # fmt: skip
        else:
            ranks = len(list(self.hosts.values())[node])
            start = [*torchrun(), "--nnodes", str(len(self.hosts)), "--nproc-per-node", str(ranks), "--node-rank",
                     str(node), "--master-addr", self.address, "--master-port", port, "--module"]  # fmt: skip
            cores = max(1, len(os.sched_getaffinity(0)) // ranks)
            variables = {"OMP_NUM_THREADS": str(cores), **variables}  # torchrun would set 1
        return self.folder.keep(Command([*start, *words], beyond_ours(variables)), below)
