from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megakor.config.schema import CorpusConfig, OnError
from megakor.corpus import prepare as module
from megakor.corpus.prepare import prepare


def write(path: Path, texts: list[str], **fields: Any) -> Path:
    path.write_text("".join(json.dumps({"text": text, **fields}, ensure_ascii=False) + "\n" for text in texts))
    return path


def side(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text(encoding="utf-8").split("\n") if line]


def texts(out: Path, name: str) -> list[str]:
    return [record["text"] for record in side(out, name)]


def test_every_document_is_on_one_side_in_normal_form(tmp_path: Path) -> None:
    given = [f"{n}번째 글▁입니다 \u2028" for n in range(400)]
    source = write(tmp_path / "a.jsonl", given, source="시험")
    figures = prepare(CorpusConfig(inputs=[str(source)], out=str(tmp_path / "out"), heldout_ratio=0.1))
    train, heldout = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "heldout")
    assert sorted(train + heldout) == sorted(f"{n}번째 글_입니다 \u2028" for n in range(400))
    assert 20 <= len(heldout) <= 60
    assert set(side(tmp_path / "out", "train")[0]) == {"id", "text", "source"}
    assert figures == json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert figures["documents"] == 400
    assert figures["replaced_u2581"] == 400
    assert figures["splits"]["train"]["documents"] == len(train)
    assert figures["splits"]["heldout"]["bytes"] == sum(len(text.encode()) for text in heldout)
    assert figures["characters"] == sum(map(len, train + heldout))
    assert figures["sources"] == {
        "시험": {"documents": 400, "bytes": figures["bytes"], "characters": figures["characters"]}
    }


def test_the_side_depends_on_the_text_alone(tmp_path: Path) -> None:
    given = [f"글 {n}" for n in range(200)]
    first = write(tmp_path / "a.jsonl", given)
    second = write(tmp_path / "b.jsonl", given[::-1] + [f"다른 글 {n}" for n in range(50)])
    prepare(CorpusConfig(inputs=[str(first)], out=str(tmp_path / "one")))
    prepare(CorpusConfig(inputs=[str(first), str(second)], out=str(tmp_path / "two")))
    assert set(texts(tmp_path / "one", "heldout")) <= set(texts(tmp_path / "two", "heldout"))
    assert not set(texts(tmp_path / "two", "train")) & set(texts(tmp_path / "two", "heldout"))


@pytest.mark.parametrize("ratio", [0.0001, 0.9999])
def test_few_documents_still_stand_on_both_sides(tmp_path: Path, ratio: float) -> None:
    source = write(tmp_path / "a.jsonl", ["하나", "둘", "셋"])
    figures = prepare(CorpusConfig(inputs=[str(source)], out=str(tmp_path / "out"), heldout_ratio=ratio))
    assert sorted(figures["splits"][name]["documents"] for name in ("train", "heldout")) == [1, 2]
    assert sorted(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "heldout")) == ["둘", "셋", "하나"]


def test_the_end_of_a_single_document_is_held_out(tmp_path: Path) -> None:
    text = "".join(f"{n}번째 줄\n" for n in range(1000))
    (tmp_path / "책.txt").write_text(text)
    prepare(CorpusConfig(inputs=[str(tmp_path / "책.txt")], out=str(tmp_path / "out"), heldout_ratio=0.1))
    (head,), (tail,) = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "heldout")
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.09 < len(tail.encode()) / len(text.encode()) < 0.12
    (tmp_path / "책.txt").write_text("가")
    with pytest.raises(ValueError, match="cannot be split in two"):
        prepare(CorpusConfig(inputs=[str(tmp_path / "책.txt")], out=str(tmp_path / "out")))


def test_equal_texts_alone_cannot_be_split(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["같은 글"] * 5)
    with pytest.raises(ValueError, match="one text only, 5 times"):
        prepare(CorpusConfig(inputs=[str(source)], out=str(tmp_path / "out")))


def test_max_bytes_takes_from_all_files(tmp_path: Path) -> None:
    for name in "abcd":
        write(tmp_path / f"{name}.jsonl", [f"{name} 글 {n:04}" for n in range(500)])
    config = CorpusConfig(inputs=[f"{tmp_path}/*.jsonl"], out=str(tmp_path / "out"), max_bytes=4000)
    figures = prepare(config)
    assert 3800 <= figures["bytes"] <= 4000
    assert figures["available"]["documents"] == 2000
    assert {name: source["documents"] for name, source in figures["sources"].items()} == pytest.approx(
        {f"{name}.jsonl": 100 for name in "abcd"}, abs=4
    )


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [f"글 {n}" for n in range(300)])
    for out in ("one", "two"):
        prepare(CorpusConfig(inputs=[str(source)], out=str(tmp_path / out), max_bytes=1500))
    for name in ("train.jsonl", "heldout.jsonl", "corpus.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_failed_run_leaves_the_last_corpus_whole(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["하나", "둘", "셋"])
    config = CorpusConfig(inputs=[str(source)], out=str(tmp_path / "out"))
    prepare(config)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert set(before) == {"train.jsonl", "heldout.jsonl", "corpus.json"}
    source.write_bytes(source.read_bytes() + b"{broken\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:4: broken JSON"):
        prepare(config)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    config.on_error = OnError.skip
    assert prepare(config)["skipped"] == 1


def test_no_disk_space_leaves_the_last_corpus_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.jsonl", ["하나", "둘", "셋"])
    config = CorpusConfig(inputs=[str(source)], out=str(tmp_path / "out"))
    prepare(config)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(config)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.suffix != ".json"} == {
        name: data for name, data in before.items() if name != "corpus.json"
    }


def test_many_sources_are_counted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SOURCES", 3)
    lines = [json.dumps({"text": f"글 {n}", "source": f"https://example.org/{n}"}) for n in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    figures = prepare(CorpusConfig(inputs=[f"{tmp_path}/a.jsonl"], out=str(tmp_path / "out")))
    assert len(figures["sources"]) == 4
    assert figures["sources"]["(other)"]["documents"] == 17


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heldout_ratio": 0.0}, "heldout_ratio=0.0 must be above 0"),
        ({"heldout_ratio": 1.0}, "heldout_ratio=1.0 must be above 0 and below 1"),
        ({"max_bytes": 0}, "max_bytes=0 must be at least 1"),
        ({"max_bytes": 1}, "max_bytes=1 leaves no document"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, values: dict, message: str) -> None:
    source = write(tmp_path / "a.jsonl", ["하나", "둘", "셋"])
    with pytest.raises(ValueError, match=message):
        prepare(CorpusConfig(inputs=[str(source)], out=str(tmp_path / "out"), **values))


def test_out_must_not_hold_an_input(tmp_path: Path) -> None:
    source = write(tmp_path / "train.jsonl", ["하나", "둘"])
    with pytest.raises(ValueError, match="out=.* must not be the folder of an input"):
        prepare(CorpusConfig(inputs=[str(source)], out=str(tmp_path)))
