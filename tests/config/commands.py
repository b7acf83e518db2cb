"""Composes a verb's configuration from a command line without running the verb."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from megakor.config.compose import QUIET_HYDRA, config_folder, main, quote_override, register_schema, to_object
from megakor.config.verbs import VERBS

ROOT = Path(__file__).resolve().parents[2]

PRETRAIN = ["run=r", "data.train=a", "data.tokenizer=b", "optimizer.lr=1e-3", "train.num_steps=10",
            "train.global_batch_size=4", "train.micro_batch_size=2", "train.sequence_length=64"]  # fmt: skip
"""What `pretrain` needs without an experiment."""

INSTRUCT = ["base=b", "tokenizer=t", *[word for word in PRETRAIN if not word.startswith("data.")]]

NEEDED = {
    "corpus": ["out=o"],
    "train-tokenizer": ["inputs=a", "out=o"],
    "shard": ["inputs=a", "tokenizer=t", "out=o"],
    "preflight": PRETRAIN,
    "pretrain": PRETRAIN,
    "simulate": PRETRAIN,
    "tune": [*PRETRAIN, "cluster.gpus=1xa100-80g"],
    "launch preflight": PRETRAIN,
    "plan": ["model.vocab_size=256"],
    "plan search": ["model.vocab_size=256", "cluster.gpus=8xa100-80g"],
    "trace": ["run=r", "step=1"],
    "instruct": INSTRUCT,
    "checkpoint list": ["run=r"],
    "checkpoint verify": ["run=r"],
    "checkpoint prune": ["run=r"],
    "checkpoint export-universal": ["run=r", "out=o"],
    "export": ["run=r", "out=o"],
    "evaluate": ["run=r", "heldout=h"],
    "generate": ["run=r", "prompt=p"],
    "import-config": ["path=p"],
    "import-model": ["path=p", "run=r"],
    "report": ["run=r"],
    "drill": [],
    "launch pretrain": PRETRAIN,
    "launch instruct": INSTRUCT,
    "demo": [],
}
"""The shortest command line of each verb."""


def composed(verb: str, *arguments: str) -> Any:
    """The checked configuration that a command line leads to. SystemExit where the verb would end in an error."""
    seen: list[Any] = []
    main(verb, seen.append, list(arguments))
    assert len(seen) == 1
    return seen[0]


@functools.cache
def with_choices(verb: str, *choices: str) -> DictConfig:
    """What YAML files lead to, before any key is given."""
    register_schema(VERBS[verb])
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose(VERBS[verb].config_name, overrides=[*QUIET_HYDRA, *choices])


def quickly_composed(verb: str, *arguments: str) -> Any:
    """The same without Hydra's start and without reading files anew, which take most of the time.

    Hydra composes what the files say, and merges the keys into it. Errors are raised as they are.
    """
    schema = VERBS[verb].schema
    groups = {path.name for path in config_folder().iterdir() if path.is_dir()}
    chosen = [argument for argument in arguments if argument.partition("=")[0].lstrip("+") in groups]
    keys = [quote_override(argument, schema, multirun=False) for argument in arguments if argument not in chosen]
    config = copy.deepcopy(with_choices(verb, *chosen))
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(keys), config)
    return to_object(config, schema)


def command(
    *words: str, timeout: float = 120, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python words…` with the package on the path."""
    full = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=timeout, cwd=cwd, env=full, check=False
    )
