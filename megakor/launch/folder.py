"""RUN/launch: what a run is started with, so that every node reads the same and anyone can look it up.

config.yaml   the resolved configuration, from which every rank starts
command       what was run, or would be
secrets       readable by their owner only (megakor/config/secrets.py)
hostfile, environment, job.sh, manifest.yaml: as the kind of cluster needs
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from filelock import FileLock, Timeout
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megakor.config.resolved import plain, resolved_yaml
from megakor.config.schema import EngineConfig, InstructConfig, PreflightConfig, PretrainConfig
from megakor.files import atomic_write
from megakor.launch.command import Command
from megakor.launch.layout import replica_size

PACKAGE = Path(__file__).resolve().parent


def template_folder() -> Path:
    """The folder of the templates: at the top of a checkout, inside the package when installed."""
    beside = PACKAGE.parents[1] / "launch"
    return beside if (beside / "slurm.sh.jinja").is_file() else PACKAGE / "templates"


class LaunchFolder:
    """The folder of one run.

    Attributes:
        run: the run folder, absolute.
        path: the launch folder in it.
        verb: what the ranks run.
        config: what is written: the verb's own keys, the same on every node.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.run = Path(config.run).absolute()
        self.path = self.run / "launch"
        verbs = {InstructConfig: "instruct", PreflightConfig: "preflight", PretrainConfig: "pretrain"}
        self.verb = next(verb for kind, verb in verbs.items() if isinstance(config, kind))
        self.config = {key: value for key, value in plain(config).items() if key != "dry_run"}
        self.node = config.cluster.node_rank
        self.config["cluster"]["node_rank"] = None  # the one key in which nodes differ
        self.replica = replica_size(config.parallel)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder while a run is started and watched over. ValueError when another launch holds it."""
        own = self.path / own_folder(self.node)
        own.mkdir(parents=True, exist_ok=True)
        lock = FileLock(own / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(f"run={self.run} must be a run that no other megakor launch is watching over") from None
        try:
            yield
        finally:
            lock.release()

    def write(self, name: str, text: str) -> Path:
        """A file of this folder."""
        with atomic_write(self.path / name) as file:
            file.write(text.encode())
        return self.path / name

    def write_config(self, num_ranks: int, below: str = ".") -> list[str]:
        """Write the configuration for so many ranks; what `python -m` takes to start from it."""
        path = self.write(f"{below}/config.yaml", self.config_yaml(num_ranks))
        return rank_words(self.verb, path.parent)

    def config_yaml(self, num_ranks: int) -> str:
        """The configuration as a file of Hydra's. Replicas are as many as there are: fewer where nodes have gone."""
        parallel = dict(self.config["parallel"])
        if parallel["data_parallel_size"] is not None:
            parallel["data_parallel_size"] = num_ranks // self.replica
        return resolved_yaml(self.verb, {**self.config, "parallel": parallel})

    def keep(self, command: Command, below: str = ".") -> Command:
        """The command, which is written down."""
        self.write(f"{below}/command", f"{command}\n")
        return command


def own_folder(node: int | None) -> str:
    """Where a node that is started by hand keeps its files: no two nodes write one file."""
    return f"node-{node}" if node else "."


def rank_words(verb: str, folder: PurePath) -> list[str]:
    """What `python -m` runs on every rank: the verb, with the configuration that lies in a folder."""
    return [f"megakor.{verb}", "--config-dir", str(folder), "--config-name", "config"]


def rendered(template: str, **values: Any) -> str:
    """A template with its values; one that is left out is an error of ours."""
    loader = FileSystemLoader(template_folder())
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                              keep_trailing_newline=True)  # fmt: skip
    return environment.get_template(template).render(**values)
