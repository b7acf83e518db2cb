"""Kubernetes: one manifest of a job with a pod a node, and what its pods need to find each other and their files.

    RUN/launch/manifest.yaml   config map (the configuration), headless service, JobSet or PyTorchJob
    RUN/launch/secret.yaml     a Secret, readable by its owner only; the manifest refers to it
    kubectl apply ─► pods ─► torchrun ─► ranks

JobSet: jobset.x-k8s.io/v1alpha2, of kubernetes-sigs/jobset. PyTorchJob: kubeflow.org/v1, of Kubeflow's training
operator, version 1; it tells each pod its number in RANK, and makes the service of the first pod itself.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath

import yaml

from megakor.config.choices import JobKind
from megakor.config.schema import EngineConfig
from megakor.launch.command import Command
from megakor.launch.environment import own_variables
from megakor.launch.folder import LaunchFolder, rank_words, rendered
from megakor.launch.layout import nodes_and_ranks

CONFIG_FOLDER = PurePosixPath("/etc/megakor")
"""Where the config map is mounted."""
LONGEST_NAME = 40
"""Characters; names of pods add to it, and have at most 63."""


def job_name(name: str) -> str:
    """A run's name as RFC 1123 has names; where signs are lost, a digest keeps it apart from others."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:LONGEST_NAME].strip("-")
    if plain == name.lower().replace("_", "-"):
        return plain
    return f"{plain or 'run'}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def write_secret(folder: LaunchFolder, name: str, config: EngineConfig, environment: Mapping[str, str]) -> list[str]:
    """Write the Secret's manifest, for its owner's eyes only; the arguments of `kubectl apply` for it.

    Raises:
        ValueError: a secret is not in the environment.
    """
    path = folder.path / "secret.yaml"
    path.unlink(missing_ok=True)
    names = config.cluster.secrets
    for missing in (secret for secret in names if secret not in environment):
        raise ValueError(f"cluster.secrets={missing} must be a variable of the environment here")
    if not names:
        return []
    manifest = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": config.cluster.kubernetes.namespace},
        "stringData": {secret: environment[secret] for secret in names},
    }
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        yaml.safe_dump(manifest, file, allow_unicode=True)
    return ["-f", str(path)]


def kubernetes_job(config: EngineConfig, folder: LaunchFolder, environment: Mapping[str, str]) -> list[Command]:
    """Write the manifest; the command that applies it.

    Raises:
        ValueError: the ranks of a node are not given, the layout does not fill them, or a secret is not there.
    """
    cluster, kubernetes = config.cluster, config.cluster.kubernetes
    nodes, ranks = nodes_and_ranks(cluster, config.parallel)
    name = job_name(config.name)
    first = f"{name}-node-0-0.{name}" if kubernetes.job is JobKind.jobset else f"{name}-master-0"
    torchrun = ["python", "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node", str(ranks),
                "--master-addr", first, "--master-port", str(cluster.master_port)]  # fmt: skip
    folder.write_config(nodes * ranks)
    manifest = rendered(
        f"{kubernetes.job.value}.yaml.jinja",
        name=name,
        nodes=nodes,
        ranks=ranks,
        port=cluster.master_port,
        restarts=config.launch.restarts,
        kubernetes=kubernetes,
        config_folder=str(CONFIG_FOLDER),
        config=folder.config_yaml(nodes * ranks),
        environment=own_variables(cluster),
        secrets=cluster.secrets,
        torchrun=shlex.join(torchrun),
        words=shlex.join(rank_words(folder.verb, CONFIG_FOLDER)),
        record=shlex.quote(f"{config.run}/exit.json"),
    )
    applied = ["-f", str(folder.write("manifest.yaml", manifest)), *write_secret(folder, name, config, environment)]
    return [folder.keep(Command(["kubectl", "apply", *applied]))]
