"""Running verbs as a user would: in processes of their own, under the launcher where they train."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megakor.config.compose import quoted
from megakor.logs import get_logger
from megakor.train.metrics import read_metrics

log = get_logger(__name__)

POLL_SECONDS = 0.05
ON_PROCESSORS = {"DS_ACCELERATOR": "cpu"}
"""DeepSpeed's switch, so that two processes run also where there is one GPU. Not in `train.device`: that module imports
DeepSpeed, which reads the switch when it is imported."""


class StageError(OSError):
    """A command of the demo failed; it has told why."""


def override(key: str, value: Any) -> str:
    """`key=value` as a command-line argument; lists are quoted item by item."""
    if isinstance(value, list):
        return f"{key}=[{','.join(quoted(str(item)) for item in value)}]"
    return f"{key}={value}"


def verb(name: str, **options: Any) -> list[str]:
    """The command of a verb in one process."""
    return [sys.executable, "-m", "megakor", name, *(override(key, value) for key, value in options.items())]


def start(command: list[str], beside: int = 0) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own, with its output on our standard error.

    Args:
        beside: commands that run at the same time, with which it shares the cores.
    """
    log.info("$ %s", shlex.join(command))
    environment = {**ON_PROCESSORS, **os.environ}
    if beside:
        num_threads = max(1, len(os.sched_getaffinity(0)) // (beside + 1))
        environment.setdefault("OMP_NUM_THREADS", str(num_threads))
    return subprocess.Popen(command, env=environment, stdout=sys.stderr, start_new_session=True)


def run(*commands: list[str]) -> None:
    """Run commands side by side to their ends; an interrupt ends them too."""
    processes = [start(command, beside=len(commands) - 1) for command in commands]
    try:
        statuses = [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            kill(process)
        raise
    for command, status in zip(commands, statuses, strict=True):
        if status:
            raise StageError(f"{shlex.join(command)}: exit status {status} must be 0")


def output(command: list[str]) -> dict[str, Any]:
    """The JSON object that a command prints as its last line."""
    log.info("$ %s", shlex.join(command))
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise StageError(f"{shlex.join(command)}: exit status {done.returncode} must be 0")
    return json.loads(done.stdout.decode().strip().splitlines()[-1])


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the launcher and all its ranks."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_and_kill(command: list[str], folder: Path, after_step: int) -> int:
    """Start a training command and SIGKILL it, launcher and ranks, once it has logged a step; returns its last step."""
    process = start(command)
    try:
        while process.poll() is None:
            steps = [record["step"] for record in read_metrics(folder) if record["kind"] == "train"]
            if steps and steps[-1] >= after_step:
                return steps[-1]
            time.sleep(POLL_SECONDS)
    finally:
        kill(process)
    raise StageError(f"{shlex.join(command)}: must run past step {after_step}, but ended with {process.returncode}")
