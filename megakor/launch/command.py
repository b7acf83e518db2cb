"""What is started: the words of a command, and what its environment has more and less than this process's."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

READ_BY_SHELLS = re.compile(r"[^\w@+=:,./~-]")


@dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
        words: program and arguments.
        environment: variables beyond this process's.
        without: variables of this process that it does not get.
    """

    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    without: Sequence[str] = ()

    def __str__(self) -> str:
        """What a shell takes."""
        hidden = ["env", *(word for name in self.without for word in ("-u", name))] if self.without else []
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*hidden, *variables, shlex.join(self.words)])

    def full_environment(self) -> dict[str, str]:
        """The whole environment to start it with."""
        kept = {name: value for name, value in os.environ.items() if name not in self.without}
        return {**kept, **self.environment}


def program(name: str, rule: str) -> str:
    """Where a program is: beside this Python, or on PATH. FileNotFoundError where it is not."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"the `{name}` command must be on PATH: {rule}")
    return found


def deepspeed() -> str:
    """The `deepspeed` launcher."""
    return program("deepspeed", "it comes with the deepspeed package")


def launched(verb: str, num_ranks: int, arguments: Sequence[str]) -> list[str]:
    """The words of a training verb under the `deepspeed` launcher, on this machine, on a port that is free now.

    OSError when the launcher is not there.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--num_gpus", str(num_ranks), "--master_port", str(port), "--no_local_rank", "--log_level", "error"]
    return [deepspeed(), *flags, "--module", f"megakor.{verb}", *arguments]


def torchrun() -> list[str]:
    """The words of torchrun, of this Python."""
    return [sys.executable, "-m", "torch.distributed.run"]


def check_plain_paths(run: Path) -> None:
    """Raise where a path has signs that a shell on the way to another node reads."""
    for what, path in {"run": run, "the working folder": Path.cwd(), "the Python": Path(sys.executable)}.items():
        found = READ_BY_SHELLS.search(str(path))
        if found:
            raise ValueError(f"{what}={path} must not contain {found[0]!r}: remote shells read it")
