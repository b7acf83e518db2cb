"""`megakor preflight` and `launch.preflight` as processes: what they print, and how they end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megakor.cli import main
from megakor.plan.hardware import find_hardware
from tests.config.commands import ROOT, command
from tests.distributed.runs import Made
from tests.ranks import free_port


def run_arguments(made: Made, run: Path) -> list[str]:
    return [
        "model=debug", f"data.train={made.train}", f"data.tokenizer={made.tokenizer}", f"run={run}",
        "train.num_steps=2", "train.global_batch_size=4", "train.micro_batch_size=2", "train.sequence_length=32",
        "train.precision=fp32", "optimizer.lr=1e-3", "logging.wandb=disabled", "logging.peak_tflops=0.1",
    ]  # fmt: skip


def start(module: str, arguments: Sequence[str], places: Sequence[dict[str, str]]) -> list[tuple[int, str, str]]:
    """Exit status, standard output and standard error of every rank.

    Args:
        places: each rank's further environment.
    """
    port = str(free_port())
    processes = []
    for rank, place in enumerate(places):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(places)),
            "LOCAL_WORLD_SIZE": str(len(places)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        command = [sys.executable, "-m", module, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, cwd="/", env=environment | place, text=True, **pipes))
    try:
        answers = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *answer) for process, answer in zip(processes, answers, strict=True)]


def test_json_and_the_measured_hardware(made: Made, tmp_path: Path) -> None:
    file = tmp_path / "기계.yaml"
    arguments = [*run_arguments(made, tmp_path / "run"), "format=json", f"out={file}", "watts=40", "slow_below=0.02"]
    (status, out, err), (other_status, other_out, _) = start("megakor.preflight", arguments, [{}, {}])
    assert (status, other_status, other_out) == (0, 0, ""), err
    report = json.loads(out)  # and nothing else there
    assert report["faults"] == []
    assert report["world_size"] == 2
    assert sum(report["seconds"].values()) < 60
    found = find_hardware(str(file))
    assert (found.watts, found.per_node, found.overlaps) == (40, 2, False)
    assert found.node_gb_per_s == pytest.approx(report["nodes"][0]["node_gb_per_s"], rel=1e-3)


def test_other_code_on_one_rank_is_a_fault_of_all(made: Made, tmp_path: Path) -> None:
    for name in ("megakor", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "code" / "megakor" / "logs.py").open("a") as file:
        file.write("# another line\n")
    places = [{}, {"PYTHONPATH": str(tmp_path / "code")}]
    (status, out, _), (other_status, other_out, _) = start(
        "megakor.preflight", run_arguments(made, tmp_path / "run"), places
    )
    assert (status, other_status, other_out) == (1, 1, "")
    lines = [line for line in out.splitlines() if line.startswith("FAULT")]
    assert len(lines) == 1
    assert ", rank 1: megakor's code=" in lines[0]
    assert lines[0].endswith(", as on the other ranks")
    assert out.splitlines()[-1] == "1 fault"
    assert not (tmp_path / "run").exists()


def test_a_run_with_launch_preflight_trains(made: Made, tmp_path: Path) -> None:
    """One rank, which nothing is slower than."""
    arguments = [*run_arguments(made, tmp_path / "run"), "launch.preflight=true"]
    ((status, _, err),) = start("megakor.pretrain", arguments, [{}])
    assert status == 0, err
    assert "preflight: 1 rank on 1 node, no faults, " in err
    assert (tmp_path / "run" / "checkpoints" / "latest").is_file()


@pytest.mark.parametrize("module", ["megakor.pretrain", "megakor.instruct"])
def test_a_run_with_launch_preflight_names_the_fault(module: str, made: Made, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*run_arguments(made, run), "launch.preflight=true"]
    if module == "megakor.instruct":
        kept = [argument for argument in arguments if not argument.startswith(("model", "data."))]
        arguments = [*kept, f"base={tmp_path}", f"tokenizer={made.tokenizer}"]
    ended = start(module, arguments, [{}, {"GLOO_SOCKET_IFNAME": "none7"}])
    assert [status for status, _, _ in ended] == [1, 1]
    for _, _, err in ended:
        assert "rank 1: GLOO_SOCKET_IFNAME=none7 (cluster.interface) must be an interface that is up" in err
        assert "Traceback" not in err
    assert not run.exists()


def launched(made: Made, run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """`megakor launch preflight` on two ranks of this machine."""
    arguments = ["preflight", *run_arguments(made, run), "launch.num_ranks=2", "slow_below=0.02", "format=json", *more]
    return command("-m", "megakor", "launch", *arguments, env={"DS_ACCELERATOR": "cpu"})


def test_launched(made: Made, tmp_path: Path) -> None:
    """The launcher's ranks print to standard output, and their status is the command's."""
    done = launched(made, tmp_path / "실행", f"data.train={tmp_path}")
    assert done.returncode != 0
    report = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert str(tmp_path) in "".join(report["faults"])
    assert report["world_size"] == 2
    assert (tmp_path / "실행/launch/config.yaml").read_text().startswith("defaults:\n- preflight_schema\n")


def test_a_job_is_not_launched_for_a_preflight(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["launch", "preflight", *run_arguments(made, tmp_path / "run"), "cluster=slurm", "cluster.num_nodes=2"])
    assert "cluster.kind=slurm must be one whose ranks start from here" in capsys.readouterr().err
