"""The ranks that a layout takes of the slots that there are."""

from __future__ import annotations

import math
from pathlib import Path

from megakor.config.schema import ClusterConfig, ParallelConfig
from megakor.launch.hosts import Hosts, read_hosts, select, trim

SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")


def replica_size(parallel: ParallelConfig) -> int:
    """Ranks of one replica."""
    return math.prod(getattr(parallel, name) for name in SIZES)


def largest_world_size(parallel: ParallelConfig, num_slots: int) -> int:
    """The most ranks, of so many slots, that a layout takes: any number of replicas, each whole.

    A data-parallel size that is set is an upper limit: batches are dealt to any smaller number of replicas, too.

    Raises:
        ValueError: there are too few slots for one replica.
    """
    replica = replica_size(parallel)
    if num_slots < replica:
        product = " × ".join(f"parallel.{name}={getattr(parallel, name)}" for name in SIZES)
        raise ValueError(f"{num_slots} slots must hold at least one replica: {product} = {replica} ranks")
    replicas = num_slots // replica
    if parallel.data_parallel_size is not None:
        replicas = min(replicas, parallel.data_parallel_size)
    return replica * replicas


def nodes_and_ranks(cluster: ClusterConfig, parallel: ParallelConfig) -> tuple[int, int]:
    """Number of nodes, and of ranks on each, where no host file tells: all of them have ranks.

    Raises:
        ValueError: the ranks of a node are not given, or the layout would leave some of them idle.
    """
    ranks = cluster.ranks_per_node
    if ranks is None:
        raise ValueError(f"cluster.ranks_per_node must be given with cluster.kind={cluster.kind.value}")
    wanted = replica_size(parallel) * (parallel.data_parallel_size or 1)
    nodes = cluster.num_nodes or math.ceil(wanted / ranks)
    size = largest_world_size(parallel, nodes * ranks)
    if size != nodes * ranks:
        product = f"cluster.num_nodes={nodes} × cluster.ranks_per_node={ranks} = {nodes * ranks}"
        raise ValueError(f"{product} ranks must be a number that the layout takes; nearest: {size}")
    return nodes, ranks


def configured_hosts(cluster: ClusterConfig) -> Hosts:
    """The hosts and slots of the host file that the configuration selects. ValueError, OSError where it cannot."""
    assert cluster.hostfile is not None
    hosts = select(read_hosts(Path(cluster.hostfile)), cluster.include, cluster.exclude)
    return trim(hosts, cluster.num_nodes, cluster.ranks_per_node)


def all_filled(cluster: ClusterConfig, parallel: ParallelConfig) -> Hosts:
    """The nodes of a run whose number cannot change: those of the host file, or so many without a name.

    Raises:
        ValueError: they are not known, or the layout would leave slots idle.
    """
    if cluster.hostfile is None:
        nodes, ranks = nodes_and_ranks(cluster, parallel)
        return {f"node-{node}": list(range(ranks)) for node in range(nodes)}
    hosts = configured_hosts(cluster)
    slots = sum(map(len, hosts.values()))
    size = largest_world_size(parallel, slots)
    if size != slots:
        rule = f"have as many slots as the layout takes, not {slots}; nearest: {size}"
        raise ValueError(f"cluster.hostfile={cluster.hostfile} must {rule}")
    return hosts
