"""The `deepspeed` launcher's command line."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path


def launched(verb: str, num_ranks: int, overrides: Sequence[str]) -> list[str]:
    """The command of a training verb under the launcher, on this machine.

    OSError when the launcher is not there.
    """
    launcher = Path(sys.executable).with_name("deepspeed")
    found = str(launcher) if launcher.is_file() else shutil.which("deepspeed")
    if found is None:
        raise FileNotFoundError("the `deepspeed` command must be on PATH; it comes with the deepspeed package")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--num_gpus", str(num_ranks), "--master_port", str(port), "--no_local_rank", "--log_level", "error"]
    return [found, *flags, "--module", f"megakor.{verb}", *overrides]
