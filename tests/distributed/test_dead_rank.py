"""A rank dies in the middle of a step: the others end, and say which one died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megakor.train.metrics import read_metrics
from tests.config.commands import ROOT
from tests.distributed.runs import Made
from tests.ranks import free_port

NUM_RANKS = 3
BOUND_SECONDS = 60


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_and_name_it(made: Made, tmp_path: Path, victim: int) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "megakor.pretrain", "model=debug", f"data.train={made.train}",
        f"data.tokenizer={made.tokenizer}", f"run={run}", "train.num_steps=100000", "train.global_batch_size=6",
        "train.micro_batch_size=2", "train.sequence_length=32", "train.precision=fp32", "optimizer.lr=1e-3",
        "logging.wandb=disabled", "logging.peak_tflops=0.1",
    ]  # fmt: skip
    port = free_port()
    environment = os.environ | {
        "WORLD_SIZE": str(NUM_RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, stderr=(tmp_path / f"{rank}.log").open("w"), stdout=subprocess.DEVNULL,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(NUM_RANKS)
    ]  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not any(record["kind"] == "train" for record in read_metrics(run)):
            assert time.monotonic() < deadline, (tmp_path / "0.log").read_text()[-2000:]
            assert all(process.poll() is None for process in processes), (tmp_path / "0.log").read_text()[-2000:]
            time.sleep(0.1)
        processes[victim].send_signal(signal.SIGKILL)
        for rank, process in enumerate(processes):
            status = process.wait(BOUND_SECONDS)
            if rank != victim:
                assert status == 1
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = [(tmp_path / f"{rank}.log").read_text() for rank in range(NUM_RANKS) if rank != victim]
    assert any(f"rank {victim} died or lost its connection" in log for log in said), said[0][-2000:]
    for log in said:
        assert "Traceback" not in log
        for other in set(range(NUM_RANKS)) - {victim}:
            assert f"rank {other} died" not in log
