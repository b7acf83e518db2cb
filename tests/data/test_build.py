from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from megakor.config.schema import OnError
from megakor.corpus.reader import Document
from megakor.data import build
from megakor.data.build import build_shards
from megakor.data.indexed import IndexedReader
from megakor.data.manifest import load_manifest, verify_manifest
from megakor.data.remote import RemoteFolder
from tests.data.tokens import ByteTokenizer, shard_config

TEXTS = [f"{number}번째 글입니다. " * (1 + number % 9) for number in range(120)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "a.jsonl", TEXTS[:70])
    write_corpus(folder / "b.jsonl", TEXTS[70:])
    return [folder / "a.jsonl", folder / "b.jsonl"]


def write_corpus(path: Path, texts: list[str]) -> None:
    lines = [json.dumps({"id": str(number), "text": text}, ensure_ascii=False) for number, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.fixture(scope="module")
def built(corpus: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "shards"
    build_shards(shard_config(corpus, out, num_workers=1), ByteTokenizer())
    return out


def test_shards_hold_the_text(built: Path) -> None:
    manifest = verify_manifest(built)
    tokens: list[int] = []
    lengths: list[int] = []
    for shard in manifest.shards:
        reader = IndexedReader(built / shard.prefix)
        assert reader.dtype == np.uint16
        tokens += reader.tokens.tolist()
        lengths += reader.sequence_lengths.tolist()
    expected = [[*text.encode(), 256] for text in TEXTS]
    assert tokens == [token for document in expected for token in document]
    assert lengths == [len(document) for document in expected]
    assert manifest.num_documents == len(TEXTS)
    assert manifest.num_text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert manifest.sources == ["a.jsonl", "b.jsonl"]


def test_shards_are_bounded(built: Path) -> None:
    sizes = [shard.num_tokens for shard in load_manifest(RemoteFolder(str(built))).shards]
    longest = max(len(text.encode()) for text in TEXTS) + 1
    assert len(sizes) > 10
    assert all(1000 <= size < 1000 + longest for size in sizes[:-1])
    assert 0 < sizes[-1] < 1000 + longest


def test_any_number_of_workers_gives_the_same_bytes(
    corpus: list[Path], built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megakor.data.build.CHUNK_DOCUMENTS", 7)
    build_shards(shard_config(corpus, tmp_path / "out", num_workers=3), ByteTokenizer())
    assert contents(tmp_path / "out") == contents(built)


def test_killed_and_started_again(corpus: list[Path], built: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle: finished shards stay as they are, the rest is made, no process is left behind."""
    out = tmp_path / "out"
    code = (
        "import megakor.data.build as build; from tests.data.tokens import *; from pathlib import Path; import sys\n"
        "build.CHUNK_DOCUMENTS = 4\n"
        "config = shard_config([Path(path) for path in sys.argv[2:]], Path(sys.argv[1]))\n"
        "build.build_shards(config, ByteTokenizer(seconds_per_document=0.04))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(out), *map(str, corpus)])
    deadline = time.monotonic() + 50
    while not (out / "shard-00003.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    assert not (out / "manifest.json").exists()
    finished = {path.stem for path in out.glob("*.json")}
    before = {name: mtime for name, mtime in times(out).items() if name.split(".")[0] in finished and "tmp" not in name}
    assert len(before) == 4 * len(finished)
    assert 4 <= len(finished) < len(load_manifest(RemoteFolder(str(built))).shards)

    build_shards(shard_config(corpus, out), ByteTokenizer())
    assert contents(out) == contents(built)
    assert before.items() <= times(out).items()


def test_already_built(corpus: list[Path], tmp_path: Path) -> None:
    config = shard_config(corpus, tmp_path / "out")
    first = build_shards(config, ByteTokenizer())
    before = times(tmp_path / "out")
    assert build_shards(config, ByteTokenizer()) == first
    assert times(tmp_path / "out") == before


def test_a_damaged_shard_is_made_again(corpus: list[Path], built: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_shards(shard_config(corpus, out), ByteTokenizer())
    (out / "shard-00005.bin").write_bytes(b"")
    build_shards(shard_config(corpus, out), ByteTokenizer())
    assert contents(out) == contents(built)


def test_shards_of_something_else_are_not_touched(corpus: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_shards(shard_config(corpus, out), ByteTokenizer())
    before = contents(out), times(out)
    (tmp_path / "c.jsonl").write_text('{"text": "다른 글"}\n')
    changes = [
        (shard_config(corpus, out, shard_size=2000), ByteTokenizer(), "out=.* shard_size=1000, must be 2000"),
        (shard_config(corpus, out), ByteTokenizer(vocab_size=300), "out=.*tokenizer_fingerprint="),
        (shard_config(corpus[:1], out), ByteTokenizer(), "out=.*other inputs"),
        (shard_config(corpus[1:], out), ByteTokenizer(), "out=.*other inputs"),
        (shard_config([*corpus, tmp_path / "c.jsonl"], out), ByteTokenizer(), "out=.*other inputs"),
    ]
    for config, tokenizer, message in changes:
        with pytest.raises(ValueError, match=message):
            build_shards(config, tokenizer)
        assert (contents(out), times(out)) == before


def test_large_vocabulary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_corpus(tmp_path / "a.jsonl", ["가나다"])
    build_shards(
        shard_config([tmp_path / "a.jsonl"], tmp_path / "out"), ByteTokenizer(vocab_size=65_537, eod_id=65_536)
    )
    reader = IndexedReader(tmp_path / "out/shard-00000")
    assert reader.dtype == np.int32
    assert reader.tokens.tolist() == [*"가나다".encode(), 65_536]


def test_text_is_counted_in_its_normal_form(tmp_path: Path) -> None:
    decomposed = "한글 \u2581"  # 한 as three letters, and the character that SentencePiece keeps for itself
    write_corpus(tmp_path / "a.jsonl", [decomposed.replace("한", "\u1112\u1161\u11ab")])
    manifest = build_shards(shard_config([tmp_path / "a.jsonl"], tmp_path / "out"), ByteTokenizer())
    assert manifest.num_text_bytes == len("한글 _".encode())
    assert manifest.shards[0].num_replaced == 1
    assert IndexedReader(tmp_path / "out/shard-00000").tokens.tolist() == [*"한글 _".encode(), 256]


def test_bad_records(tmp_path: Path) -> None:
    """Stopping leaves no manifest and no half-written file; skipping leaves them out."""
    path = tmp_path / "a.jsonl"
    write_corpus(path, TEXTS)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:60], '{"text": ', *lines[60:]]))
    with pytest.raises(ValueError, match=r"a\.jsonl:61: broken JSON"):
        build_shards(shard_config([path], tmp_path / "out"), ByteTokenizer())
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix == ".tmp" or path.name == "manifest.json"]
    manifest = build_shards(shard_config([path], tmp_path / "out", on_error=OnError.skip), ByteTokenizer())
    assert manifest.num_documents == len(TEXTS)


def test_ids_past_the_vocabulary(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a.jsonl", ["가나다"])
    with pytest.raises(ValueError, match="below the tokenizer's vocab_size=200"):
        build_shards(shard_config([tmp_path / "a.jsonl"], tmp_path / "out"), ByteTokenizer(vocab_size=200, eod_id=199))


@pytest.mark.parametrize("name", ["shard_size", "num_workers"])
def test_sizes(corpus: list[Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        build_shards(shard_config(corpus, tmp_path / "out", **{name: 0}), ByteTokenizer())


@dataclass
class DyingTokenizer(ByteTokenizer):
    """Its process is gone at the first text, as when memory runs out."""

    def encode(self, text: str) -> list[int]:
        os._exit(9)


def test_a_process_that_dies(corpus: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError, match="num_workers=2: a tokenising process died"):
        build_shards(shard_config(corpus, tmp_path / "out"), DyingTokenizer())


def test_reading_waits_for_the_processes() -> None:
    """Memory is bounded: of an endless corpus only so much is read ahead of the writer."""
    read = 0

    def endless() -> Iterator[Document]:
        nonlocal read
        while True:
            read += 1
            yield Document(str(read), "가" * 50_000, "endless")

    tokenised = build._tokenise(endless(), ByteTokenizer(), "uint16", 1)
    for _ in range(5):
        next(tokenised)
    tokenised.close()
    documents_per_chunk = -(-build.CHUNK_CHARACTERS // 50_000)
    assert read <= documents_per_chunk * (build.CHUNKS_PER_WORKER + 5)


def test_disk_full(corpus: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error arrives as it is, finished shards stay, and the same command finishes the work."""
    real = os.fsync
    calls = iter(range(10**6))

    def full(descriptor: int) -> None:
        if next(calls) == 10:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        build_shards(shard_config(corpus, tmp_path / "out"), ByteTokenizer())
    assert (tmp_path / "out/shard-00000.json").exists()
    assert not (tmp_path / "out/manifest.json").exists()
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert build_shards(shard_config(corpus, tmp_path / "out"), ByteTokenizer()).num_documents == len(TEXTS)
