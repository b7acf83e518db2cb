"""`megakor launch` on this machine, under the real launcher: a rank is killed, and the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from megakor.train.exit_record import ExitRecord, read_exit
from megakor.train.metrics import read_metrics
from tests.config.commands import ROOT, quickly_composed
from tests.distributed.runs import Job, Made, curve, run_all, validation
from tests.distributed.test_launcher import finish, overrides

NAMESPACES = False


def ranks(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "megakor.pretrain" in child.cmdline() and "deepspeed" not in " ".join(child.cmdline()[:4]):
                found[int(child.environ()["RANK"])] = child
        except (psutil.Error, KeyError):
            continue
    return found


def kill_in_the_middle(process: subprocess.Popen[str], run: Path, rank: int, step: int) -> int:
    """SIGKILL a rank once a step is on record; returns the steps that were."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        done = len(curve(run))
        if done >= step:
            os.kill(ranks(process)[rank].pid, signal.SIGKILL)
            return done
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


def test_launch_starts_again_after_a_kill(made: Made, tmp_path: Path) -> None:
    """A rank dies; `megakor launch` starts the run again, which ends as if nothing had been, and says so."""
    whole, killed = tmp_path / "끊김 없이", tmp_path / "끊긴 실행"
    assert [error for error, _ in run_all(2, [Job(quickly_composed("pretrain", *overrides(made, whole)))])] == [None]
    command = [sys.executable, "-m", "megakor", "launch", "pretrain", *overrides(made, killed), "launch.num_ranks=2",
               "launch.restarts=3", "launch.pause_seconds=0.1"]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    kill_in_the_middle(process, killed, rank=1, step=12)
    status, errors = finish(process)
    assert status == 0, errors
    assert "start 1 of run=" in errors
    assert "restart 1 of 3 in 0 s" in errors
    assert "finished after step 30" in errors
    assert len([record for record in read_metrics(killed) if record["kind"] == "start"]) == 2
    assert "Traceback" not in errors
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == [
        "latest",
        "step-00000025",
        "step-00000030",
    ]
    assert sorted(tmp_path.iterdir()) == sorted([whole, killed])  # nothing beside the run folders
    assert curve(killed) == curve(whole)
    assert validation(killed) == validation(whole)
    assert read_exit(killed) == ExitRecord("finished", "", 30, "step-00000030", 2)
