"""The real command under the real launcher: what goes wrong is one clear line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.config.commands import ROOT
from tests.distributed.runs import Made
from tests.ranks import free_port

NUM_STEPS = 30


def overrides(made: Made, run: Path) -> list[str]:
    """A tiny model in bf16 on two replicas."""
    return [
        "name=시험 실행", f"run={run}", f"data.train={made.train}", f"+data.validation.held={made.heldout}",
        f"data.tokenizer={made.tokenizer}", "model.hidden_size=32", "model.num_attention_heads=2",
        "model.intermediate_size=64", f"train.num_steps={NUM_STEPS}", "train.global_batch_size=8",
        "train.micro_batch_size=2", "train.sequence_length=32", "train.precision=bf16", "optimizer.lr=3e-3",
        "checkpoint.interval=5", "checkpoint.keep_last=2", "evaluation.interval=15", "logging.wandb=disabled",
        "logging.peak_tflops=0.1",
    ]  # fmt: skip


def start(made: Made, run: Path, *arguments: str) -> subprocess.Popen[str]:
    """`deepspeed --num_gpus 2 … megakor.pretrain`."""
    folder = Path(sys.executable).parent
    command = [
        str(folder / "deepspeed"), "--num_gpus", "2", "--no_local_rank", "--master_port", str(free_port()),
        "--module", "megakor.pretrain", *overrides(made, run), *arguments,
    ]  # fmt: skip
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=run.parent, env=env)


def finish(process: subprocess.Popen[str], timeout: float = 180) -> tuple[int, str]:
    """Exit status and standard error."""
    try:
        _, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            child.kill()
        raise
    return process.returncode, errors


def test_a_bad_run_folder_under_the_launcher_is_one_clear_line(made: Made, tmp_path: Path) -> None:
    """Only rank 0 meets the error; the other one must not bury it under a traceback."""
    (tmp_path / "파일").write_text("")
    status, errors = finish(start(made, tmp_path / "파일", "parallel.pipeline_parallel_size=2"))
    assert status != 0
    ours = [line for line in errors.splitlines() if line.startswith("megakor pretrain: error: ")]
    assert len(ours) == 1, errors
    assert "파일" in ours[0]
    assert "Traceback" not in errors, errors


@pytest.mark.slow
def test_an_error_that_every_rank_meets_is_told_once(made: Made, tmp_path: Path) -> None:
    arguments = ["parallel.pipeline_parallel_size=2", "parallel.data_parallel_size=2"]
    status, errors = finish(start(made, tmp_path / "run", *arguments))
    assert status != 0
    ours = [line for line in errors.splitlines() if line.startswith("megakor pretrain: error: ")]
    assert len(ours) == 1, errors
    assert "parallel.data_parallel_size=2" in ours[0]
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "checkpoints").exists()
