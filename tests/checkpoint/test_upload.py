"""Checkpoints go to object storage and come back: over a bad network, by the rule of what stays, never by halves."""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megakor.checkpoint import remote as there
from megakor.checkpoint.fetch import fetch_checkpoint, look
from megakor.checkpoint.format import MANIFEST, PIECES, CheckpointManifest, committed, step_folder
from megakor.checkpoint.keep import Keep
from megakor.checkpoint.reader import CheckpointValues, newest_whole
from megakor.checkpoint.remote import SET_ASIDE, RemoteRun, folder_name, steps_of_this_run
from megakor.checkpoint.save import Saver, save_checkpoint
from megakor.checkpoint.upload import Uploader, Uploading, writer
from megakor.data.skips import Skip, add_skip, read_skips
from tests.checkpoint.pieces import manifest, save, save_cut, snapshot, state, whole_pieces
from tests.data.conftest import KEYS, Bucket
from tests.data.test_remote import run
from tests.ranks import run_ranks


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(there, "MAX_WAIT", 0.02)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The log's warnings."""
    logger, found = logging.getLogger("megakor"), []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler = Kept(logging.WARNING)
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def alone_meet(state: Uploading) -> list[int]:
    return [state]


def upload(uploader: Uploader, *folders: Path) -> None:
    """One after the other, each waited for."""
    for folder in folders:
        uploader.offer(folder)
        uploader.finish(alone_meet)


def check(folder: Path) -> None:
    """The checkpoint holds the state."""
    with CheckpointValues(folder) as values:
        for (kind, name), tensor in state().items():
            assert torch.equal(values.read(kind, name, 0, tensor.numel()), tensor.view(-1))


def own_files(folder: Path) -> None:
    """What a run folder has besides checkpoints."""
    for name in ("config.yaml", "metrics.jsonl", "tokenizer/토크나이저.model", "shards/train.parquet"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n")
    (folder / "exit.json").write_text("{}")  # of one start


def place(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    if kind == "s3":
        return request.getfixturevalue("bucket").url
    return f"file://{tmp_path}/저장소 a" if kind == "file" else f"{tmp_path}/저장소 a"


@pytest.mark.parametrize("kind", ["path", "file", "s3"])
def test_there_and_back(kind: str, tmp_path: Path, alone: None, request: pytest.FixtureRequest) -> None:
    """To each place, and into a new folder: the same bytes, committed like any other."""
    url, old, new = place(kind, tmp_path, request), tmp_path / "old", tmp_path / "new"
    own_files(old)
    told: list[tuple[int, float, int]] = []
    uploader = Uploader(old, url, Keep(), lambda *what: told.append(what))
    folder = save(old, 5)
    upload(uploader, folder)
    uploader.close()
    assert [what[0] for what in told] == [5]
    assert told[0][2] == sum(path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST)
    remote = RemoteRun(url)
    assert remote.read("checkpoints/latest") == b"step-00000005"
    assert look(remote, new) == [5]
    assert fetch_checkpoint(remote, new, 5) is None
    before = snapshot(old)
    del before["exit.json"]
    assert snapshot(new) == before
    check(step_folder(new, 5))
    upload(again := Uploader(new, url, Keep(), lambda *what: told.append(what)), step_folder(new, 5))
    again.close()
    assert len(told) == 1  # it is there already


def test_only_what_is_missing_or_has_grown_comes_back(tmp_path: Path, alone: None) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    own_files(elsewhere)
    own_files(here)
    (here / "config.yaml").write_text("ours")
    (here / "metrics.jsonl").write_text("shorter")
    (here / "shards/train.parquet").unlink()
    add_skip(elsewhere, Skip(9, 5, [[1, 2]], "왜"))
    assert look(RemoteRun(str(elsewhere)), here) == []
    assert (here / "config.yaml").read_text() == "ours"
    assert (here / "metrics.jsonl").read_text() == "metrics.jsonl\n"
    assert (here / "shards/train.parquet").exists()
    assert len(read_skips(here)) == 1


def test_a_bad_network_is_got_over(bucket: Bucket, tmp_path: Path, alone: None) -> None:
    """Three requests of ten fail and half of an object is stored once: it is sent again, and proves whole."""
    run = tmp_path / "run"
    folder = save(run, 5)
    bucket.faults.failing_puts = bucket.faults.failing = 0.3
    bucket.faults.cut = {"rank-00000.safetensors": 1}
    own_files(run)
    uploader = Uploader(run, bucket.url, Keep(last=1))
    upload(uploader, folder, save(run, 10), save(run, 15))
    uploader.close()
    assert bucket.faults.counts["503"] >= 2
    assert bucket.faults.counts["cut"] == 1
    assert sum(path.endswith("step-00000005/rank-00000.safetensors") for path in bucket.faults.puts) >= 2
    bucket.faults.truncated = {"rank-00000.safetensors": 1}
    assert fetch_checkpoint(RemoteRun(bucket.url), tmp_path / "new", 15) is None
    check(step_folder(tmp_path / "new", 15))


def test_the_rule_of_what_stays_holds_there(bucket: Bucket, tmp_path: Path, alone: None) -> None:
    """What never became a checkpoint goes too."""
    run, saved = tmp_path / "run", []
    losses = {10: 2.0, 20: 1.0, 30: 3.0, 40: 3.0, 50: 3.0}
    for step in losses:
        about = manifest(step, validation={"held": losses[step]})
        saved.append(save_checkpoint(run, about, whole_pieces()))
    bucket.put(folder_name(7, "rank-00003.safetensors"), 100)
    remote, keep = RemoteRun(bucket.url), Keep(last=2, every=30, best="held")
    upload(Uploader(run, bucket.url, keep), *saved[:4])
    assert remote.listing().whole == [20, 30, 40]
    upload(Uploader(run, bucket.url, keep), saved[4])  # another start, which must read what is there
    listing = remote.listing()
    assert listing.whole == [20, 30, 40, 50]
    assert sorted(listing.steps) == listing.whole
    upload(Uploader(run, bucket.url, Keep(last=1)), save(run, 60))
    assert sorted(remote.listing().steps) == [60]
    assert remote.read("checkpoints/latest") == b"step-00000060"


def test_a_slow_link_leaves_out_what_is_between(bucket: Bucket, tmp_path: Path, alone: None, lines: list[str]) -> None:
    """And what is on its way or waits is not removed here, until it has arrived."""
    bucket.faults.stuck = {"step-00000010/rank-00000.safetensors"}
    uploader = Uploader(tmp_path, bucket.url, Keep(last=1))
    saver = Saver(tmp_path, whole_pieces(), Keep(last=1), asynchronous=False, spared=lambda: uploader.holds)
    for step in (10, 20, 30, 40):
        began = time.monotonic()
        folder = saver.start(manifest(step))
        assert folder is not None
        uploader.offer(folder)
        uploader.heard([uploader.state])
        assert time.monotonic() - began < 2
    assert uploader.holds == {10, 40}
    assert [folder.name[-2:] for folder in committed(tmp_path)] == ["10", "30", "40"]  # 30 has been waiting
    assert [line.split()[0] for line in lines] == ["step-00000020", "step-00000030"]
    assert "is not uploaded: step-00000010 is still on its way" in lines[0]
    bucket.faults.go.set()
    uploader.finish(alone_meet)
    saver.finish()
    assert [folder.name[-2:] for folder in committed(tmp_path)] == ["40"]
    assert RemoteRun(bucket.url).listing().whole == [40]
    uploader.close()
    saver.close()


def test_a_failing_upload_is_a_warning_and_at_the_end_an_error(
    bucket: Bucket, tmp_path: Path, alone: None, lines: list[str]
) -> None:
    bucket.faults.failing_puts = 1.0
    uploader = Uploader(tmp_path, bucket.url, Keep())
    uploader.offer(save(tmp_path, 5))
    while uploader.state is Uploading.working or uploader.holds:
        uploader.heard([uploader.state])
        time.sleep(0.01)
    assert len(lines) == 1
    assert lines[0].startswith(f"uploading step-00000005: rank 0: {bucket.url}/{folder_name(5)}/")
    assert "cannot be written" in lines[0]
    assert lines[0].endswith("; the next checkpoint tries again")
    uploader.offer(save(tmp_path, 10))
    with pytest.raises(OSError, match=r"uploading step-00000010: rank 0: .* whole in run=.* same command tries again"):
        uploader.finish(alone_meet)
    assert RemoteRun(bucket.url).listing().whole == []
    bucket.faults.failing_puts = 0.0
    upload(uploader, save(tmp_path, 15))
    uploader.close()
    assert RemoteRun(bucket.url).listing().whole == [15]


def test_nobody_listens(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    """At the start it is an error where nothing is here to go on from, and a warning where something is."""
    s3fs = pytest.importorskip("s3fs")
    secret = "geheimnis-0123456789\n"  # a pasted line break; clients quote the header that it spoils
    for key, value in {**KEYS, "AWS_SECRET_ACCESS_KEY": secret, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    remote = RemoteRun("s3://nobody/run")
    with pytest.raises(OSError, match=r"^s3://nobody/run: cannot be read (?s:(?!geheim).)*$"):
        look(remote, tmp_path)
    uploader = Uploader(tmp_path, "s3://nobody/run", Keep())
    with pytest.raises(OSError, match=r"uploading step-00000005: rank 0: s3://nobody/run: cannot be read"):
        upload(uploader, save(tmp_path, 5))
    assert look(remote, tmp_path) == []
    assert "the run goes on from what is in its folder" in lines[-1]
    assert "geheim" not in "".join(lines)
    uploader.close()
    s3fs.S3FileSystem.clear_instance_cache()


MISSING = """
import torch.distributed as dist
from pathlib import Path
from megakor.checkpoint.keep import Keep
from megakor.checkpoint.upload import Uploader
from tests.checkpoint.pieces import save
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
uploader = Uploader(Path({run!r}), {url!r}, Keep())
uploader.offer(save(Path({run!r}), 5))
try:
    uploader.finish(lambda state: [state])
except OSError as error:
    print("error:", error)
uploader.close()
"""


def test_missing_credentials_are_named(bucket: Bucket, tmp_path: Path) -> None:
    without = {key: value for key, value in KEYS.items() if "KEY" not in key}
    code = MISSING.format(run=str(tmp_path), url=bucket.url)
    shown = run(code, **without, AWS_ENDPOINT_URL=os.environ["AWS_ENDPOINT_URL"], PYTHONPATH=os.getcwd())
    said = f"{bucket.url}: needs credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    assert said in shown.strip().splitlines()[-1], shown


def test_damage_there_is_named_and_passed_over(bucket: Bucket, tmp_path: Path, alone: None) -> None:
    """A file of the right size with other bytes, one that is missing, a manifest that is none."""
    uploader = Uploader(tmp_path / "run", bucket.url, Keep())
    upload(uploader, *(save(tmp_path / "run", step) for step in (5, 10, 15, 20)))
    uploader.close()
    remote, size = RemoteRun(bucket.url, attempts=2), (step_folder(tmp_path / "run", 10) / PIECES).stat().st_size
    bucket.put(folder_name(10, PIECES), size)
    remote.remove([folder_name(15, "rank-00000.safetensors")])
    remote.write(folder_name(20, MANIFEST), b"{}")
    new = tmp_path / "new"
    for step, said in ((20, "damaged"), (15, "missing; must be"), (10, "sha256=.* must be")):
        damage = fetch_checkpoint(remote, new, step)
        assert damage is not None
        assert re.search(said, damage), damage
    listing = remote.listing()
    assert listing.whole == [5]
    assert folder_name(10, SET_ASIDE) in listing.sizes
    assert committed(new) == []
    assert fetch_checkpoint(remote, new, 5) is None
    check(step_folder(new, 5))


def test_steps_that_the_run_went_back_on(tmp_path: Path, alone: None) -> None:
    """They are not gone on from, and go when the next checkpoint arrives; other starts' are never removed."""
    run, url = tmp_path / "run", str(tmp_path / "there")
    uploader, remote = Uploader(run, url, Keep()), RemoteRun(url)
    upload(uploader, *(save(run, step) for step in (5, 10, 15)))
    add_skip(run, Skip(12, 5, [[1, 2]], "왜"))
    assert look(remote, run) == [5]
    assert look(remote, tmp_path / "new") == [5, 10, 15]  # nobody knows of it there yet: the spike comes again
    shutil.rmtree(step_folder(run, 15))
    upload(uploader, save(run, 8, seed=1))
    assert remote.listing().whole == [5, 8]
    assert look(remote, tmp_path / "other") == [5, 8]
    assert len(read_skips(tmp_path / "other")) == 1
    stranger = Uploader(tmp_path / "stale", url, Keep())
    with pytest.raises(OSError, match=r"holds a checkpoint of step 8, and must hold none after 6: another start has"):
        upload(stranger, save(tmp_path / "stale", 6))
    assert remote.listing().whole == [5, 8]


def test_which_steps_are_of_this_run() -> None:
    first, second = Skip(12, 5, [[1, 2]], "왜"), Skip(30, 20, [[3, 4]], "왜")
    steps = [20, 5, 10]
    assert steps_of_this_run([], [], steps) == [5, 10, 20]
    assert steps_of_this_run([first], [first], steps) == [5, 10, 20]
    assert steps_of_this_run([first, second], [first], [*steps, 25]) == [5, 10, 20]
    assert steps_of_this_run([first, second], [], steps) == [5]
    assert steps_of_this_run([], [first], steps) == [5, 10, 20]


def test_the_same_step_again_is_replaced(tmp_path: Path, alone: None) -> None:
    """Its files never stand beside the manifest of the other."""
    url, first, second = str(tmp_path / "there"), tmp_path / "first", tmp_path / "second"
    upload(Uploader(first, url, Keep()), save(first, 5, seed=1))
    (tmp_path / "there" / folder_name(5, "rank-00007.safetensors")).write_bytes(b"of more ranks")
    upload(Uploader(second, url, Keep()), save(second, 5))
    assert fetch_checkpoint(RemoteRun(url), tmp_path / "new", 5) is None
    check(step_folder(tmp_path / "new", 5))
    names = {path.name for path in (tmp_path / "there" / folder_name(5)).iterdir()}
    assert names == {"manifest.json", "pieces.parquet", "rank-00000.safetensors"}


def test_what_is_abandoned_ends_soon(bucket: Bucket, tmp_path: Path, alone: None) -> None:
    bucket.faults.failing_puts = 1.0
    uploader = Uploader(tmp_path, bucket.url, Keep())
    uploader.remote = replace(uploader.remote, attempts=1000, max_wait=30.0)
    uploader.offer(save(tmp_path, 5))
    uploader.offer(save(tmp_path, 10))
    time.sleep(0.5)
    began = time.monotonic()
    uploader.abandon()
    assert time.monotonic() - began < 3
    assert (uploader.state, uploader.holds) == (Uploading.idle, set())
    bucket.faults.failing_puts = 0.0
    upload(uploader, save(tmp_path, 15))
    uploader.close()
    assert RemoteRun(bucket.url).listing().whole == [15]


def test_who_sends_what() -> None:
    assert [writer(name) for name in ("pieces.parquet", "rank-00000.safetensors", "rank-00123.safetensors")] == [
        0,
        0,
        123,
    ]


def send_by_ranks(run: Path, address: str, fails: bool) -> str:
    """Every rank saves and sends its own file; rank 1 cannot, at first."""
    os.environ |= {**KEYS, "AWS_ENDPOINT_URL": address}
    there.MAX_WAIT = 0.02
    group = list(range(dist.get_world_size()))

    def meet(state: Uploading) -> list[int]:
        states = [None for _ in group]
        dist.all_gather_object(states, int(state))
        return states  # type: ignore[return-value]

    uploader = Uploader(run, "s3://ranks/run", Keep())
    error = ""
    if fails and dist.get_rank() == 1:
        uploader.remote = replace(uploader.remote, url="s3://not-there/run", attempts=2)
    uploader.offer(save_cut(run, 10 if fails else 20, seed=3))
    try:
        uploader.finish(meet)
    except OSError as caught:
        error = str(caught)
    uploader.close()
    return error


def fetch_by_ranks(run: Path, address: str) -> str | None:
    os.environ |= {**KEYS, "AWS_ENDPOINT_URL": address}
    return fetch_checkpoint(RemoteRun("s3://ranks/run"), run, 20)


def test_ranks_send_and_fetch_together(bucket: Bucket, tmp_path: Path) -> None:
    """Three send, each its own; what fails on one is told by all; two others share out the fetching."""
    bucket.files.mkdir("ranks")
    address = os.environ["AWS_ENDPOINT_URL"]
    errors = run_ranks(send_by_ranks, 3, tmp_path / "run", address, True)
    assert len(set(errors)) == 1
    assert "uploading step-00000010: rank 1: s3://not-there/run/checkpoints/step-00000010/rank-00001" in errors[0]
    assert run_ranks(send_by_ranks, 3, tmp_path / "run", address, False) == [""] * 3
    remote = RemoteRun("s3://ranks/run")
    assert remote.listing().whole == [20]
    assert len(remote.listing().steps[20]) == 5
    assert run_ranks(fetch_by_ranks, 2, tmp_path / "new", address) == [None, None]
    newest = newest_whole(tmp_path / "new", contents=True)
    assert newest is not None
    check(newest)
    assert CheckpointManifest.load(newest).files.keys() >= {f"rank-0000{rank}.safetensors" for rank in range(3)}
