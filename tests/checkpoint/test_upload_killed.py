"""Killed at any operation of an upload or of a fetch: nothing that another start takes for whole is not whole."""

from __future__ import annotations

import os
import time
from multiprocessing import Process
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megakor.checkpoint.fetch import fetch_checkpoint, look
from megakor.checkpoint.format import committed, step_folder
from megakor.checkpoint.keep import Keep
from megakor.checkpoint.reader import CheckpointValues, newest_whole
from megakor.checkpoint.remote import RemoteRun, folder_name
from megakor.checkpoint.upload import Uploader
from tests.checkpoint.dying import die_at, group
from tests.checkpoint.pieces import save, state
from tests.data.conftest import Bucket
from tests.ranks import context


def seed_of(step: int) -> int:
    return 0 if step == 10 else step


def check(folder: Path, seed: int) -> None:
    """The checkpoint holds the state of a seed."""
    with CheckpointValues(folder) as values:
        for (kind, name), tensor in state(seed).items():
            assert torch.equal(values.read(kind, name, 0, tensor.numel()), tensor.view(-1))


def upload(run: Path, url: str, *steps: int) -> None:
    uploader = Uploader(run, url, Keep(last=1))
    for step in steps:
        uploader.offer(step_folder(run, step))
        uploader.finish(lambda state: [state])


def test_killed_at_every_operation_of_an_upload(tmp_path: Path) -> None:
    """What is there is one of the two, whole; and another start sends the newer one, and leaves nothing else there."""
    run = tmp_path / "run"
    with group():
        for step in (5, 10):
            save(run, step, seed=seed_of(step))
    (run / "config.yaml").write_text("name: 시험\n")

    def die(url: str, last: int) -> int:
        return die_at(last, lambda: upload(run, url, 5), lambda: upload(run, url, 10))

    total = die(str(tmp_path / "whole"), 1 << 30)
    assert total > 25
    seen = set()
    for last in range(total):
        url = str(tmp_path / f"there {last}")
        assert die(url, last) == 0
        remote, new = RemoteRun(url), tmp_path / f"new {last}"
        newest = look(remote, new)[-1]
        with group():
            assert fetch_checkpoint(remote, new, newest) is None
            upload(run, url, 10)
        check(step_folder(new, newest), seed_of(newest))
        seen.add(newest)
        if newest == 5:
            assert sorted(remote.listing().steps) == [10]
            assert not [name for name in remote.listing().sizes if name.endswith(".tmp") and "step-" in name]
    assert seen == {5, 10}


def test_killed_at_every_operation_of_a_fetch(tmp_path: Path) -> None:
    """What is here is whole; another start fetches the rest."""
    run, url = tmp_path / "run", str(tmp_path / "there")
    (run / "tokenizer").mkdir(parents=True)
    (run / "tokenizer" / "모델").write_text("모델")
    with group():
        save(run, 10)
        upload(run, url, 10)
    remote = RemoteRun(url)

    def before(new: Path) -> None:
        """A folder with an older checkpoint, and a damaged one of the same step."""
        save(new, 5, seed=5)
        (save(new, 10, seed=3) / "pieces.parquet").write_bytes(b"damaged")

    def fetch(new: Path) -> None:
        assert look(remote, new) == [10]
        assert fetch_checkpoint(remote, new, 10) is None

    total = die_at(1 << 30, lambda: before(tmp_path / "whole"), lambda: fetch(tmp_path / "whole"))
    assert total > 20
    seen = set()
    for last in range(total):
        new = tmp_path / f"new {last}"
        assert die_at(last, lambda new=new: before(new), lambda new=new: fetch(new)) == 0
        newest = newest_whole(new, contents=True)  # as a start without the object storage would
        assert newest is not None
        number = int(newest.name[-2:])
        check(newest, seed_of(number))
        seen.add(number)
        assert {folder.name for folder in committed(new)} <= {"step-00000005", "step-00000010"}
        with group():
            fetch(new)
        check(step_folder(new, 10), 0)
        assert not list(new.rglob("*.fetching"))
        assert (new / "tokenizer" / "모델").read_text() == "모델"
    assert seen == {5, 10}


def upload_over(environment: dict[str, str], run: Path, url: str, step: int) -> None:
    os.environ |= environment
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    upload(run, url, step)


def start(run: Path, url: str, step: int) -> Process:
    environment = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    process = context().Process(target=upload_over, args=(environment, run, url, step))
    process.start()
    return process


@pytest.mark.parametrize(
    "stuck", ["pieces.parquet", "rank-00000.safetensors", "config.yaml", "manifest.json", "latest"]
)
def test_killed_while_sending_to_s3(stuck: str, bucket: Bucket, tmp_path: Path, alone: None) -> None:
    """At each file: what is there is the older checkpoint, or the newer one once its manifest has come."""
    run, remote = tmp_path / "run", RemoteRun(bucket.url)
    for step in (5, 10):
        save(run, step, seed=seed_of(step))
    upload(run, bucket.url, 5)
    (run / "config.yaml").write_text("name: 시험\n")
    bucket.faults.stuck = {stuck}
    bucket.faults.puts.clear()
    process = start(run, bucket.url, 10)
    deadline = time.monotonic() + 30
    while not any(path.endswith(stuck) for path in bucket.faults.puts) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    expected = 10 if stuck == "latest" else 5
    assert look(remote, tmp_path / "new") == ([5, 10] if stuck == "latest" else [5])
    bucket.faults.stuck = set()
    assert fetch_checkpoint(remote, tmp_path / "new", expected) is None
    check(step_folder(tmp_path / "new", expected), seed_of(expected))
    assert stuck == "latest" or folder_name(10, "manifest.json") not in remote.listing().sizes
    upload(run, bucket.url, 10)
    assert look(remote, tmp_path / "newer")[-1] == 10
