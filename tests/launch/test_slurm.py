"""Slurm's batch script, and who is put into the queue again. On a real Slurm it runs in tests/cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megakor.cli import main
from megakor.launch.requeue import AGAIN, DONE, GIVEN_UP, decide
from megakor.train.exit_record import ExitRecord
from tests.config.commands import ROOT

SLURM = ["launch", "experiment=demo", "cluster=slurm", "cluster.num_nodes=2", "cluster.ranks_per_node=2"]
STAND_INS = {
    # A run of two nodes: srun starts no ranks here, it waits for STOP and leaves the exit record that they would.
    "srun": """#!/bin/sh
printf '%s\\n' "$@" > "$FOLDER/srun"
[ -e "$FOLDER/fails" ] && exit 1
while [ ! -e "$FOLDER/run/STOP" ]; do sleep 0.05; done
[ -e "$FOLDER/too_late" ] && exit 1
rm "$FOLDER/run/STOP"
echo '{"outcome": "stopped", "reason": "", "step": 4, "checkpoint": null, "world_size": 4}' > "$FOLDER/run/exit.json"
""",
    "scontrol": """#!/bin/sh
case $1 in
  show) printf 'node-1\\nnode-2\\n' ;;
  *) echo "$@" >> "$FOLDER/scontrol" ;;
esac
""",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(*arguments: str) -> Path:
    main([*SLURM, "run=run", "--dry-run", *arguments])
    return Path("run/launch/job.sh").resolve()


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_the_script_is_sound(launcher: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["cluster.slurm.partition=gpu", "cluster.slurm.time_limit=2-00:00:00", "cluster.slurm.notice_seconds=120",
               f"cluster.slurm.node_launcher={launcher}", "cluster.environment.ODD='a b$c'"]  # fmt: skip
    path = script(*options)
    assert capsys.readouterr().out == f"sbatch {path}\n"
    subprocess.run(["bash", "-n", str(path)], check=True)
    checked = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    text = path.read_text()
    asked = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert asked >= {
        "--nodes=2", "--ntasks-per-node=1", "--gres=gpu:2", "--partition=gpu", "--time=2-00:00:00", "--requeue",
        "--signal=B:USR1@120", "--exclusive", f"--chdir={Path.cwd()}",
    }  # fmt: skip
    assert "export ODD='a b$c'\n" in text


def test_without_accelerators() -> None:
    assert "--gres" not in script("cluster.slurm.accelerator=").read_text()


def job(folder: Path, restart: int = 0) -> subprocess.Popen[str]:
    """The batch script as slurmd starts it, with stand-ins for Slurm's commands."""
    for name, text in STAND_INS.items():
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FOLDER": str(folder), "PYTHONPATH": str(ROOT),
        "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_CPUS_ON_NODE": "8", "SLURM_JOB_ID": "7", "SLURM_NODEID": "0",
        "SLURM_RESTART_COUNT": str(restart),
    }  # fmt: skip
    return subprocess.Popen(["bash", "run/launch/job.sh"], env=environment, text=True, stderr=subprocess.PIPE)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_notice_saves_and_requeues(folder: Path) -> None:
    script()
    process = job(folder)
    wait_for(folder / "srun")
    process.send_signal(signal.SIGUSR1)
    assert (process.wait(timeout=60), (folder / "scontrol").read_text()) == (0, "requeue 7\n")
    words = (folder / "srun").read_text().splitlines()
    assert words[:4] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=8"]
    assert words[-7:] == [sys.executable, "node-1", "megakor.pretrain", "--config-dir", str(folder / "run/launch"),
                          "--config-name", "config"]  # fmt: skip
    assert "--nproc-per-node=2" in "".join(words)


def test_a_notice_that_came_too_late_stops_no_later_start(folder: Path) -> None:
    """The run died before it could heed its STOP: that is a failure, and the next start must not heed it."""
    script("launch.restarts=5")
    (folder / "too_late").touch()
    process = job(folder)
    wait_for(folder / "srun")
    process.send_signal(signal.SIGUSR1)
    assert (process.wait(timeout=60), (folder / "scontrol").read_text()) == (0, "requeue 7\n")
    assert not (folder / "run" / "STOP").exists()


def test_a_stop_by_hand_ends_the_job(folder: Path) -> None:
    script()
    process = job(folder)
    wait_for(folder / "srun")
    (folder / "run" / "STOP").touch()
    assert process.wait(timeout=60) == 0
    assert not (folder / "scontrol").exists()


def test_failures_are_made_good_and_given_up(folder: Path) -> None:
    """The first never began; the second never began either, so that no start helps."""
    script("launch.restarts=5", "cluster.slurm.node_launcher=deepspeed")
    (folder / "fails").touch()
    first = job(folder)
    assert (first.wait(timeout=60), (folder / "scontrol").read_text()) == (0, "requeue 7\n")
    assert (folder / "run/launch/hostfile").read_text() == "node-1 slots=2\nnode-2 slots=2\n"
    second = job(folder, restart=1)
    _, said = second.communicate(timeout=60)
    assert (second.returncode, (folder / "scontrol").read_text()) == (1, "requeue 7\n")
    assert "failed before its first step twice, so that no start helps" in said


class Job:
    """The starts of a job, by what each leaves behind."""

    def __init__(self, run: Path, restarts: int) -> None:
        self.run, self.restarts, self.count = run, restarts, 0
        (run / "launch").mkdir(parents=True)

    def start(self, outcome: str | None, last: int | None, noticed: bool = False, status: int = 1) -> int:
        (self.run / "exit.json").unlink(missing_ok=True)
        with (self.run / "metrics.jsonl").open("a") as file:
            if last is not None:
                file.write(json.dumps({"kind": "start", "step": 0}) + "\n")
                file.write(json.dumps({"kind": "train", "step": last}) + "\n")
        if outcome is not None:
            ExitRecord(outcome, "까닭", last or 0, None, 4).write(self.run)
        self.count += 1
        return decide(self.run, status, noticed, self.restarts, first=self.count == 1)


def test_who_goes_again(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", restarts=2)
    assert job.start("failed", 5) == AGAIN
    assert job.start("stopped", 9, noticed=True, status=0) == AGAIN
    assert job.start(None, 12) == AGAIN  # killed, further on
    assert job.start("finished", 20, noticed=True, status=0) == DONE


def test_a_stop_by_hand_and_nothing_to_do(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", restarts=2)
    assert job.start("stopped", 5, status=0) == DONE
    assert job.start(None, None, status=0) == DONE


def test_given_up(tmp_path: Path) -> None:
    twice = Job(tmp_path / "twice", restarts=9)
    assert [twice.start("failed", 5), twice.start("failed", 5)] == [AGAIN, GIVEN_UP]
    often = Job(tmp_path / "often", restarts=1)
    assert [often.start("failed", 5), often.start("failed", 6)] == [AGAIN, GIVEN_UP]
    never = Job(tmp_path / "never", restarts=9)
    assert [never.start("failed", 5), never.start(None, None), never.start(None, None)] == [AGAIN, AGAIN, GIVEN_UP]


def test_a_new_job_counts_anew(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", restarts=1)
    assert [job.start("failed", 5), job.start("failed", 6)] == [AGAIN, GIVEN_UP]
    job.count = 0
    assert job.start("failed", 6) == AGAIN


def test_shellcheck_is_there() -> None:
    assert shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
