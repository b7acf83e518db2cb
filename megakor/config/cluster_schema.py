"""The configuration's types of the machines that a run has, and of what starts its processes there."""

from __future__ import annotations

from dataclasses import dataclass

from megakor.config.choices import ClusterKind, JobKind, NodeLauncher
from megakor.config.fields import key, section


@dataclass
class SlurmConfig:
    """What the batch script asks Slurm for; null leaves an option out."""

    partition: str | None = key(None, help="partition")
    account: str | None = key(None, help="account that is charged")
    time_limit: str | None = key(None, help="as sbatch takes it, such as 2-00:00:00")
    accelerator: str = key("gpu", help="generic resource of which a node gives each rank one; empty: none, for CPUs")
    notice_seconds: int = key(300, help="a run is asked to save so long before its time is up", unit="s")
    node_launcher: NodeLauncher = key(NodeLauncher.torchrun, help="what the task of a node starts: torchrun, deepspeed")
    options: list[str] = key([], help="further options of sbatch, such as --exclusive")


@dataclass
class KubernetesConfig:
    """What the manifest asks Kubernetes for."""

    job: JobKind = key(JobKind.jobset, help="kind of the job: jobset or pytorchjob")
    image: str = key("megakor:latest", help="container image, such as one of launch/Dockerfile")
    namespace: str = key("default", help="namespace of what is made")
    volume_claim: str = key("megakor", help="persistent volume claim with data and run folders, shared by all nodes")
    mount_path: str = key("/work", help="where it is mounted, which is the working directory")
    shared_memory: str = key("64Gi", help="size of /dev/shm; NCCL needs it")
    accelerator: str = key("nvidia.com/gpu", help="name of the resource; empty: none, for CPUs")


@dataclass
class ClusterConfig:
    """The machines of a run, and what starts its processes there."""

    kind: ClusterKind = key(
        ClusterKind.local, help="local, deepspeed (pdsh or one command a node), torchrun, openmpi, slurm, kubernetes"
    )
    gpus: str | None = key(
        None, help="number x kind for plan, such as 256xa100-80g; null: what the layout needs, of a100-80g"
    )
    num_nodes: int | None = key(
        None, help="machines; null: those of the host file, or as many as the layout's sizes fill, or one", unit="nodes"
    )
    ranks_per_node: int | None = key(
        None, help="processes of a node; null: one for each slot or accelerator; in a plan 8", unit="ranks"
    )
    hostfile: str | None = key(None, help="hosts and their slots, one a line, as deepspeed reads them")
    include: str = key("", help="hosts and slots of the host file to use, such as node-1@node-2:0,1")
    exclude: str = key("", help="hosts and slots of the host file to leave out")
    ssh: bool = key(True, help="reach the other nodes; false: start this node's ranks alone, on every node by hand")
    node_rank: int | None = key(None, help="with ssh=false: number of this node", unit="node")
    master_address: str | None = key(None, help="of the first node, as all nodes reach it; null: the first host")
    master_port: int = key(29500, help="port on it where ranks meet")
    interface: str | None = key(None, help="network interface of every node that ranks talk over, such as ib0")
    environment: dict[str, str] = key({}, help="environment variables of every rank, such as NCCL's")
    secrets: list[str] = key(
        [], help="environment variables here that ranks get by a file which only its owner reads, never by a command"
    )
    price_krw: float = key(
        2325.0, help="of an accelerator's hour; 3 to 4 hundred million won for 256 A100s over 3 to 4 weeks", unit="KRW"
    )
    krw_per_usd: float = key(1400.0, help="exchange rate", unit="KRW")
    slurm: SlurmConfig = section(SlurmConfig, help="with kind=slurm")
    kubernetes: KubernetesConfig = section(KubernetesConfig, help="with kind=kubernetes")
