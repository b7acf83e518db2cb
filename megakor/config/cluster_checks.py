"""The rules of the machines of a run, and of what starts its processes there."""

from __future__ import annotations

import re

from megakor.config.choices import ClusterKind
from megakor.config.rules import positive, require
from megakor.config.schema import ClusterConfig, EngineConfig, LaunchConfig

WITH_HOSTS = (ClusterKind.deepspeed, ClusterKind.openmpi)
"""Kinds whose nodes a host file may name, and that a launcher on one machine reaches."""
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET = {"KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIALS"}
"""Words of which a variable's name has one when its value is a secret."""


def count_and_kind(gpus: str) -> tuple[int, str]:
    """The number and the kind of accelerators: `256xa100-80g` -> 256 of a100-80g.

    ValueError where it is not of that form.
    """
    found = re.fullmatch(r"([1-9][0-9]*)x(.+)", gpus)
    require(found is not None, "cluster.gpus", gpus, "be number x kind, such as 256xa100-80g")
    assert found is not None
    return int(found[1]), found[2]


def check_cluster(config: EngineConfig) -> None:
    """The rules of `cluster`, and of `launch` on it."""
    cluster = config.cluster
    for name in ("num_nodes", "ranks_per_node", "price_krw", "krw_per_usd"):
        positive(f"cluster.{name}", getattr(cluster, name))
    if cluster.gpus is not None:
        count_and_kind(cluster.gpus)
    require(0 < cluster.master_port < 65536, "cluster.master_port", cluster.master_port, "lie between 1 and 65535")
    rule = "be empty with cluster.include, which says all"
    require(not (cluster.include and cluster.exclude), "cluster.exclude", cluster.exclude, rule)
    if cluster.kind is ClusterKind.torchrun:
        rule = "be false with cluster.kind=torchrun, which starts the ranks of its own node alone"
        require(not cluster.ssh, "cluster.ssh", cluster.ssh, rule)
    if cluster.kind is ClusterKind.openmpi:
        require(cluster.ssh, "cluster.ssh", cluster.ssh, "be true with cluster.kind=openmpi: mpirun reaches the nodes")
    if cluster.node_rank is not None:
        positive("cluster.node_rank", cluster.node_rank, allow_zero=True)
        rule = "be null with cluster.ssh=true: the launcher numbers the nodes"
        require(not cluster.ssh, "cluster.node_rank", cluster.node_rank, rule)
    check_environment(cluster)
    positive("cluster.slurm.notice_seconds", cluster.slurm.notice_seconds)
    for option in cluster.slurm.options:
        require(option.startswith("-"), "cluster.slurm.options", option, "be options of sbatch, such as --exclusive")
    check_name(cluster)
    check_restarts(cluster, config.launch)


def check_name(cluster: ClusterConfig) -> None:
    """Kubernetes' names are those of RFC 1123."""
    for name in ("namespace", "volume_claim"):
        value = getattr(cluster.kubernetes, name)
        fits = re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", value) is not None
        require(fits, f"cluster.kubernetes.{name}", value, "be lower-case letters, digits and hyphens, at most 63")
    path = cluster.kubernetes.mount_path
    require(path.startswith("/"), "cluster.kubernetes.mount_path", path, "begin with /")
    size = cluster.kubernetes.shared_memory
    rule = "be a size as Kubernetes writes it, such as 64Gi"
    require(bool(re.fullmatch(r"[1-9][0-9]*([kMGT]i?)?", size)), "cluster.kubernetes.shared_memory", size, rule)


def check_environment(cluster: ClusterConfig) -> None:
    """What stands in a configuration is written down and printed, so that secrets may not stand there."""
    for name in (*cluster.environment, *cluster.secrets):
        key = "secrets" if name in cluster.secrets else "environment"
        require(bool(VARIABLE.fullmatch(name)), f"cluster.{key}", name, "be a name of an environment variable")
    for name, value in cluster.environment.items():
        if SECRET & set(name.upper().split("_")) or name in cluster.secrets:  # the value is not told, for it may be one
            raise ValueError(f"cluster.environment.{name} must be left out, and named in cluster.secrets")
        require("\n" not in value, f"cluster.environment.{name}", repr(value), "be of one line")


def check_restarts(cluster: ClusterConfig, launch: LaunchConfig) -> None:
    """What starts a run again differs from kind to kind."""
    kind = cluster.kind.value
    if cluster.kind is not ClusterKind.local:
        rule = f"be null with cluster.kind={kind}: cluster.num_nodes and cluster.ranks_per_node say it"
        require(launch.num_ranks is None, "launch.num_ranks", launch.num_ranks, rule)
        if not cluster.ssh and cluster.kind in (ClusterKind.torchrun, ClusterKind.deepspeed):
            rule = "be 0 with cluster.ssh=false: no node starts the others again"
            require(launch.restarts == 0, "launch.restarts", launch.restarts, rule)
        rule = f"be false with cluster.kind={kind}, which has as many nodes at every start"
        elastic = cluster.ssh and cluster.kind in WITH_HOSTS
        require(elastic or not launch.elastic, "launch.elastic", launch.elastic, rule)
