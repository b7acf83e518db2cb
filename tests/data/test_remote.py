from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megakor.data.failures import may_pass, without_secrets
from megakor.data.indexed import FileRecord
from megakor.data.remote import RemoteFolder
from tests.data.conftest import KEYS, Bucket

CONTENT = bytes(range(256)) * 100
RECORD = FileRecord(len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def check_folder(folder: RemoteFolder, target: Path) -> None:
    assert folder.read("manifest.json") == b"{}"
    assert folder.sizes() == {"manifest.json": 2, "아래/shard 0#1.bin": len(CONTENT), "빈.bin": 0}
    folder.fetch("아래/shard 0#1.bin", RECORD, target)
    assert target.read_bytes() == CONTENT
    folder.fetch("빈.bin", FileRecord(0, hashlib.sha256().hexdigest()), target)
    assert target.read_bytes() == b""
    with pytest.raises(FileNotFoundError, match=r"없다\.bin: not there"):
        folder.fetch("없다.bin", RECORD, target)
    for wrong in (replace(RECORD, size=RECORD.size - 1), replace(RECORD, size=RECORD.size + 1)):
        with pytest.raises(OSError, match=rf"shard 0#1\.bin: .*size={RECORD.size} must be {wrong.size}"):
            folder.fetch("아래/shard 0#1.bin", wrong, target)


@pytest.mark.parametrize("kind", ["path", "relative", "file", "memory", "s3"])
def test_one_folder_at_every_address(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    import fsspec

    place = tmp_path / "말뭉치 a::b"
    if kind == "s3":
        url = request.getfixturevalue("bucket").url
    else:
        url = {"file": f"file://{place}", "memory": f"memory://{tmp_path.name}/말뭉치 a"}.get(kind, str(place))
    writer = {"s3": url, "memory": url}.get(kind)
    for name, content in {"manifest.json": b"{}", "아래/shard 0#1.bin": CONTENT, "빈.bin": b""}.items():
        if writer is None:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        else:
            with fsspec.open(f"{writer}/{name}", "wb") as file:
                file.write(content)
    if kind == "relative":
        monkeypatch.chdir(tmp_path)
        url = "./x/../말뭉치 a::b/"
    folder = RemoteFolder(url, attempts=2, max_wait=0.01)
    assert folder.is_local is (kind not in ("memory", "s3"))
    check_folder(folder, tmp_path / "target")
    check_folder(pickle.loads(pickle.dumps(folder)), tmp_path / "target")
    with pytest.raises(FileNotFoundError, match="must hold files"):
        RemoteFolder(f"{url}/nowhere").sizes()


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "a/../../b", "", "."])
def test_names_stay_inside(name: str, tmp_path: Path) -> None:
    for folder in (RemoteFolder("memory://x"), RemoteFolder(str(tmp_path))):
        with pytest.raises(ValueError, match="must stay inside its folder"):
            folder.fetch(name, RECORD, tmp_path / "target")
        if name:
            with pytest.raises(ValueError, match="must stay inside its folder"):
                folder.read(name)
    with pytest.raises(ValueError, match="must stay inside its folder"):
        RemoteFolder(str(tmp_path)).local_path(name)


def test_one_listing(bucket: Bucket) -> None:
    for number in range(5):
        bucket.put(f"shard-{number}.bin", 10 + number)
    bucket.faults.gets.clear()
    assert bucket.folder.sizes() == {f"shard-{number}.bin": 10 + number for number in range(5)}
    assert len(bucket.faults.gets) == 1
    bucket.put("new.bin", 1)
    assert len(bucket.folder.sizes()) == 6  # no listing is remembered


def test_faults_pass(bucket: Bucket, tmp_path: Path, quick: Callable[[int], None]) -> None:
    """5 % of requests fail, some answers break off, some are corrupt once: every file arrives whole."""
    quick(10_000)
    records = {f"shard-{number}": bucket.put(f"shard-{number}", 100_000, number) for number in range(8)}
    bucket.faults.failing = 0.05
    bucket.faults.truncated = {"shard-1": 2, "shard-2": 1}
    bucket.faults.corrupt = {"shard-3": 1}
    bucket.faults.slow = {"shard-4": 0.02}
    for name, record in records.items():
        bucket.folder.fetch(name, record, tmp_path / name)
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == record.sha256
    assert bucket.faults.counts["503"] >= 2
    assert bucket.faults.counts["truncated"] == 3
    assert bucket.faults.counts["corrupt"] == 1
    assert bucket.faults.counts["slow"] >= 10


def test_always_corrupt(bucket: Bucket, tmp_path: Path) -> None:
    """An object of the right size with other bytes."""
    record, other = bucket.put("good.bin", 1000), bucket.put("bad.bin", 1000, seed=1)
    bucket.faults.gets.clear()
    with pytest.raises(OSError, match=rf"말뭉치 a/bad\.bin: sha256={other.sha256} must be {record.sha256}: changed$"):
        replace(bucket.folder, attempts=3).fetch("bad.bin", record, tmp_path / "bad")
    assert bucket.downloads("bad.bin") == 3


def test_corrupt_on_the_way(bucket: Bucket, tmp_path: Path) -> None:
    """The client compares S3's own checksum of an object that is asked for whole: that too is tried again."""
    record = bucket.put("bad.bin", 1000)
    bucket.faults.corrupt = {"bad.bin": 2}
    bucket.folder.fetch("bad.bin", record, tmp_path / "bad")
    assert bucket.faults.counts["corrupt"] == 2
    bucket.faults.corrupt = {"bad.bin": 1000}
    with pytest.raises(OSError, match=r"bad\.bin: .*(checksum|sha256)"):
        replace(bucket.folder, attempts=3).fetch("bad.bin", record, tmp_path / "bad")


def test_always_unavailable_or_cut(bucket: Bucket, tmp_path: Path) -> None:
    record = bucket.put("cut.bin", 1000)
    bucket.faults.truncated = {"cut.bin": 1000}
    with pytest.raises(OSError, match=r"cut\.bin: cannot be read"):
        replace(bucket.folder, attempts=3).fetch("cut.bin", record, tmp_path / "cut")
    assert bucket.faults.counts["truncated"] == 3
    bucket.faults.reset()
    bucket.faults.failing = 1.0
    with pytest.raises(OSError, match=r"cut\.bin: cannot be read \(OSError: .*Service Unavailable"):
        replace(bucket.folder, attempts=4).read("cut.bin")
    assert bucket.faults.counts["503"] == 4


def test_object_smaller_than_the_record(bucket: Bucket, tmp_path: Path, quick: Callable[[int], None]) -> None:
    quick(400)
    record = bucket.put("short.bin", 1000)
    for claimed in (1100, 5000):
        with pytest.raises(OSError, match=rf"short\.bin: .*size=1000 must be {claimed}"):
            replace(bucket.folder, attempts=2).fetch("short.bin", replace(record, size=claimed), tmp_path / "short")


def test_permanent_errors_fail_at_once(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("there.bin", 10)
    bucket.faults.gets.clear()
    started = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"s3://.*/gone\.bin: not there"):
        replace(bucket.folder, max_wait=30.0).fetch("gone.bin", RECORD, tmp_path / "gone")
    assert time.monotonic() - started < 2
    assert bucket.downloads("gone.bin") == 1


def test_nobody_listens(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(OSError, match=r"s3://nobody/x: cannot be read .*127\.0\.0\.1:9"):
            RemoteFolder("s3://nobody", attempts=3, max_wait=0.01).read("x")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def run(code: str, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**clean, **environment})
    return done.stdout + done.stderr


def test_missing_credentials(bucket: Bucket) -> None:
    keys = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    without = {key: value for key, value in KEYS.items() if key not in keys}
    code = f"from megakor.data.remote import RemoteFolder; RemoteFolder({bucket.url!r}).read('manifest.json')"
    shown = run(code, **without, AWS_ENDPOINT_URL=os.environ["AWS_ENDPOINT_URL"])
    last = shown.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: {bucket.url}/manifest.json: needs credentials: AWS_ACCESS_KEY_ID and AWS_SEC")


def test_no_secret_is_shown(bucket: Bucket) -> None:
    url = "http://user:geheim/x@127.0.0.1:9/folder"
    code = f"from megakor.data.remote import RemoteFolder as R; f = R({url!r}, 1); print(f, [f]); f.read('a.bin')"
    shown = run(code)
    assert "geheim" not in shown.replace(code, "")
    assert "http://***@127.0.0.1:9/folder/a.bin: cannot be read" in shown
    broken = "geheimnis-0123456789\n"  # a pasted line break; clients quote the header that it spoils
    keys = {**KEYS, "AWS_SECRET_ACCESS_KEY": broken, "AWS_SESSION_TOKEN": broken}
    code = "from megakor.data.remote import RemoteFolder as R; R('s3://b', 1).read('a')"
    shown = run(code, **keys, AWS_ENDPOINT_URL=os.environ["AWS_ENDPOINT_URL"])
    assert "s3://b/a: " in shown.splitlines()[-1]
    assert "geheimnis" not in shown


def test_secrets_in_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    text = "ftp://me:p/w@host/a s3://KEY@b/x https://h/p?X-Amz-Signature=abc, hf://datasets/u/r@main/f 'hf_0123456789'"
    assert without_secrets(text) == ("ftp://***@host/a s3://***@b/x https://h/p?*** hf://datasets/u/r@main/f '***'")


def test_addresses_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^nope://x: protocol='nope' must be one that fsspec knows$"):
        RemoteFolder("nope://x").read("a")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"^gs://x: gs:// needs a package that is not there: install gcsfs$"):
        RemoteFolder("gs://x").sizes()
    from fsspec.registry import _registry

    monkeypatch.delitem(_registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"install megakor\[s3\]$"):
        RemoteFolder("s3://x").sizes()


class Answer(Exception):
    def __init__(self, status: int) -> None:
        self.status = status


def test_what_may_pass() -> None:
    passing = [Answer(500), Answer(503), Answer(429), ConnectionResetError(), TimeoutError(), OSError("short read")]
    permanent = [Answer(400), Answer(403), Answer(404), FileNotFoundError(), PermissionError(), KeyError("x")]
    assert [may_pass(error) for error in passing + permanent] == [True] * 6 + [False] * 6


def test_a_fork_uses_the_folder_anew(bucket: Bucket) -> None:
    """A process that has read from S3 forks; parent and child both go on reading."""
    bucket.put("a.bin", 1000)
    code = (
        "import os, sys, faulthandler; faulthandler.dump_traceback_later(20, exit=True)\n"
        "from megakor.data.remote import RemoteFolder\n"
        f"folder = RemoteFolder({bucket.url!r}); folder.read('a.bin')\n"
        "child = os.fork()\n"
        "assert len(folder.read('a.bin')) == 1000\n"
        "if child == 0: os._exit(7)\n"
        "print('child', os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    shown = run(code, **KEYS, AWS_ENDPOINT_URL=os.environ["AWS_ENDPOINT_URL"])
    assert shown == "child 7\n"
