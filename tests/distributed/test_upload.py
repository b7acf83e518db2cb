"""A run whose cluster is lost goes on from object storage, bit for bit; and one that cannot upload trains on."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from megakor.checkpoint import remote as there
from megakor.checkpoint.format import FOLDER, committed
from megakor.checkpoint.remote import RemoteRun
from megakor.config.schema import OnSpike, PretrainConfig
from megakor.data.skips import read_skips
from megakor.train.engine import Engine, StepResult
from megakor.train.exit_record import read_exit
from megakor.train.metrics import read_metrics
from tests.checkpoint.pieces import snapshot
from tests.data.conftest import KEYS, Bucket
from tests.distributed.runs import PP2, Job, Made, configuration, curve, run_job, run_jobs
from tests.distributed.test_health import Trouble, run_with
from tests.ranks import run_ranks

SHORT: dict[str, Any] = {"train__num_steps": 6, "checkpoint__interval": 2, "evaluation__interval": 0}


def over(address: str) -> None:
    os.environ |= {**KEYS, "AWS_ENDPOINT_URL": address}
    there.MAX_WAIT = 0.02


def run_over(address: str, jobs: list[Job]) -> list[Any]:
    over(address)
    return run_jobs(jobs)


def spike_over(address: str, config: PretrainConfig, trouble: Trouble) -> tuple[str | None, list[str]]:
    over(address)
    return run_with(config, trouble)


def test_a_lost_cluster(made: Made, bucket: Bucket, tmp_path: Path) -> None:
    """Trained on two replicas, gone on with on two stages: from S3 as from the run folder itself."""
    address, faults = os.environ["AWS_ENDPOINT_URL"], bucket.faults
    faults.failing = faults.failing_puts = 0.1
    url, lost, kept, found = bucket.url, tmp_path / "lost", tmp_path / "kept", tmp_path / "found"
    first = configuration(made, lost, **SHORT, checkpoint__upload=url, checkpoint__keep_last=1)
    for error, lines in run_ranks(run_over, 2, address, [Job(first)])[0]:
        assert error is None
        assert not [line for line in lines if "WARNING: uploading" in line]
    remote = RemoteRun(url)
    assert remote.listing().whole == [6]
    assert len(committed(lost)) == 1
    records = {record["step"]: record for record in read_metrics(lost) if record["kind"] == "upload"}
    files = [path for path in committed(lost)[0].iterdir() if path.name != "manifest.json"]
    assert records[6]["bytes"] == sum(path.stat().st_size for path in files)
    assert records[6]["seconds"] > 0
    shutil.copytree(lost, kept)
    shutil.rmtree(lost)
    on = {"train__num_steps": 10, "checkpoint__interval": 4, "evaluation__interval": 0, **PP2}
    jobs = [Job(configuration(made, kept, **on)), Job(configuration(made, found, **on, checkpoint__upload=url))]
    for error, _ in run_ranks(run_over, 2, address, jobs)[0]:
        assert error is None
    assert [row[0] for row in curve(found)] == list(range(1, 11))
    assert curve(found)[6:] == curve(kept)[6:]
    last = f"{FOLDER}/step-00000010"
    for file in (kept / last).glob("*.safetensors"):
        assert (found / last / file.name).read_bytes() == file.read_bytes()
        assert RemoteRun(url).read(f"{last}/{file.name}") == file.read_bytes()
    theirs = {name: content for name, content in snapshot(found).items() if name.startswith(("tokenizer", "shards"))}
    assert theirs
    assert all(remote.read(name) == content for name, content in theirs.items())
    never = configuration(made, tmp_path / "never", **on, checkpoint__upload=url, checkpoint__resume="never")
    [[(error, _)]] = [run_ranks(run_over, 2, address, [Job(never)])[0]]
    assert error is not None
    assert "must hold no checkpoints with checkpoint.resume=never" in error


def slow_over(address: str, job: Job) -> None:
    """A run of steps that leave an upload the time for a stage each."""
    over(address)
    real = Engine.train_step

    def train_step(engine: Engine, batches: list, lr: float, step: int) -> StepResult:
        time.sleep(0.2)
        return real(engine, batches, lr, step)

    Engine.train_step = train_step  # type: ignore[method-assign]
    run_job(job)


def test_killed_while_uploading(made: Made, bucket: Bucket, tmp_path: Path) -> None:
    """The newest checkpoint has no manifest there yet; its folder is lost, and the run goes on from the one before."""
    address, changes = os.environ["AWS_ENDPOINT_URL"], {**SHORT, "train__num_steps": 12, "checkpoint__interval": 4}
    bucket.faults.stuck = {"step-00000008/manifest.json"}
    lost = configuration(made, tmp_path / "lost", **changes, checkpoint__upload=bucket.url)
    run_ranks(slow_over, 2, address, Job(lost, kill=11), killed=True)
    found = RemoteRun(bucket.url).listing()
    assert found.whole in ([4], [])  # none only where a stage took longer than a step
    bucket.faults.stuck = set()  # what is held stays held
    again = configuration(made, tmp_path / "again", **changes, checkpoint__upload=bucket.url)
    whole = configuration(made, tmp_path / "whole", **changes)
    for error, _ in run_ranks(run_over, 2, address, [Job(again), Job(whole)])[0]:
        assert error is None
    starts = [record["step"] for record in read_metrics(tmp_path / "again") if record["kind"] == "start"]
    assert starts == ([0, 4] if found.whole else [0])
    assert curve(tmp_path / "again") == curve(tmp_path / "whole")


def test_what_cannot_be_uploaded_ends_no_training(made: Made, bucket: Bucket, tmp_path: Path) -> None:
    """A warning each, an error when all is trained; the same command uploads what is left."""
    address, faults = os.environ["AWS_ENDPOINT_URL"], bucket.faults
    faults.failing_puts = 1.0
    config = configuration(made, tmp_path / "run", **SHORT, checkpoint__upload=bucket.url)
    [[(error, lines)]] = run_ranks(run_over, 1, address, [Job(config)])
    assert error is not None
    assert error.startswith(f"uploading step-00000006: rank 0: {bucket.url}/")
    assert "the same command tries again" in error
    warnings = [line for line in lines if line.startswith("WARNING: uploading step-")]
    assert [line.split(":")[1].split()[1] for line in warnings][-1] == "step-00000006"
    assert len(curve(tmp_path / "run")) == 6
    ended = read_exit(tmp_path / "run")
    assert ended is not None
    assert (ended.outcome, ended.checkpoint) == ("failed", "step-00000006")
    faults.failing_puts = 0.0
    [[(error, lines)]] = run_ranks(run_over, 1, address, [Job(config)])
    assert error is None
    assert any("nothing to do" in line for line in lines)
    assert RemoteRun(bucket.url).listing().whole == [6]
    nowhere = configuration(made, tmp_path / "nowhere", **SHORT, checkpoint__upload=bucket.url)
    [[(error, _)]] = run_ranks(run_over, 1, "http://127.0.0.1:9", [Job(nowhere)])
    assert error is not None
    assert error.startswith(f"{bucket.url}: cannot be read")


def test_a_spike_and_a_stop(made: Made, bucket: Bucket, tmp_path: Path) -> None:
    """Gone back on, a run leaves nothing there of the steps that it has not taken; stopped, it uploads its last."""
    address = os.environ["AWS_ENDPOINT_URL"]
    acts = {"health__on_spike": OnSpike.act, "health__spike_window": 4, "health__spike_skip": 0}
    changes = {**SHORT, **acts, "train__num_steps": 14}
    config = configuration(made, tmp_path / "run", **changes, checkpoint__upload=bucket.url)
    [(error, _)] = run_ranks(spike_over, 1, address, config, Trouble("spike", 9))
    assert error is None
    [skip] = read_skips(tmp_path / "run")
    again = configuration(
        made, tmp_path / "again", **{**changes, "train__num_steps": 20}, checkpoint__upload=bucket.url
    )
    [(error, lines)] = run_ranks(spike_over, 1, address, again, Trouble("signal", 16, rank=0))
    assert error is None
    assert any("asked to stop; step 17 is saved" in line for line in lines)
    assert read_skips(tmp_path / "again") == [skip]
    assert RemoteRun(bucket.url).listing().whole[-2:] == [16, 17]
    assert [row[0] for row in curve(tmp_path / "again")] == list(range(1, 18))
