"""The environment variables of every rank, secrets aside.

    here: PYTHONPATH, NCCL_… ─► .deepspeed_env ─► cluster.interface ─► cluster.environment; later ones win

`.deepspeed_env`, in the home and in the working folder, is the `deepspeed` launcher's own; it holds for every kind.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from megakor.config.schema import ClusterConfig

PASSED = ("PYTHONPATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "DS_ACCELERATOR")
PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "UCX_")
"""Variables here that say how ranks find code, devices and each other go to all of them."""
REMOTE_SHELLS_READ = re.compile(r'["$`\\%!\n]')
"""What the double quotes that `deepspeed` puts around a value do not protect, and pdsh's own sign."""


def deepspeed_env(environment: Mapping[str, str]) -> dict[str, str]:
    """What the launcher's own files set. ValueError on a line that is not NAME=value."""
    found: dict[str, str] = {}
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    for folder in (Path.home(), Path.cwd()):
        path = folder / name
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            key, equals, value = line.partition("=")
            if line.strip() and not line.lstrip().startswith("#"):
                if not equals:
                    raise ValueError(f"{path}: line {number}, {line!r}, must be NAME=value")
                found[key.strip()] = value.strip()
    return found


def own_variables(cluster: ClusterConfig) -> dict[str, str]:
    """What the configuration alone says: the interface, and `cluster.environment`."""
    interface = cluster.interface
    meeting = {} if interface is None else {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    return {**meeting, **cluster.environment}


def rank_environment(cluster: ClusterConfig, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of every rank, by name."""
    here = {name: value for name, value in environment.items() if name in PASSED or name.startswith(PREFIXES)}
    merged = {**here, **deepspeed_env(environment), **own_variables(cluster)}
    return {name: merged[name] for name in sorted(merged) if name not in cluster.secrets}


def environment_file(variables: Mapping[str, str]) -> str:
    """The variables as `deepspeed` reads them, which hands them on through a remote shell.

    Raises:
        ValueError: a value would not come out of that shell as it went in.
    """
    for name, value in variables.items():
        found = REMOTE_SHELLS_READ.search(value)
        if found:
            raise ValueError(f"{name}={value!r} must not contain {found[0]!r}: remote shells read it")
    return "".join(f"{name}={value}\n" for name, value in variables.items())
