from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megakor.config.schema import OnError
from megakor.corpus.reader import Document, ReadCounts, expand, read_documents

RECORDS = [{"id": f"문서-{n}", "text": f"{n}번째 문서.\n둘째 줄 漢字 ㅋㅋ\t㎡", "source": "시험"} for n in range(50)]


def lines(records: list[dict] = RECORDS) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def read(*inputs: Path | str, skip: bool = False, **keys: str) -> tuple[list[Document], ReadCounts]:
    counts = ReadCounts()
    on_error = OnError.skip if skip else OnError.stop
    return list(read_documents([str(name) for name in inputs], on_error=on_error, counts=counts, **keys)), counts


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def parquet(path: Path, table: dict) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=7)
    return path


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    two_frames = zstandard.compress(lines(RECORDS[:20])) + zstandard.compress(lines(RECORDS[20:]))
    two_members = gzip.compress(lines(RECORDS[:20])) + gzip.compress(lines(RECORDS[20:]))
    files = [
        write(tmp_path / "가.jsonl", lines()),
        write(tmp_path / "a.jsonl.gz", gzip.compress(lines())),
        write(tmp_path / "b.jsonl.gz", two_members),
        write(tmp_path / "a.jsonl.zst", zstandard.compress(lines())),
        write(tmp_path / "b.jsonl.zst", two_frames),
        parquet(tmp_path / "a.parquet", {key: [record[key] for record in RECORDS] for key in RECORDS[0]}),
    ]
    expected = [Document(record["id"], record["text"], "시험") for record in RECORDS]
    for file in files:
        documents, counts = read(file)
        assert documents == expected, file
        size = sum(len(record["text"].encode()) for record in RECORDS)
        assert counts == ReadCounts(files=1, documents=50, bytes=size)


def test_a_txt_is_one_document_without_bom_and_carriage_returns(tmp_path: Path) -> None:
    file = write(tmp_path / "글.txt", "\ufeff첫 줄\r\n둘째 줄\n".encode())
    assert read(file)[0] == [Document("글.txt:1", "첫 줄\n둘째 줄\n", "글.txt")]


def test_missing_ids_are_file_and_line_and_other_keys_serve(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '\ufeff{"본문": "하나"}\n\n{"본문": "둘", "번호": 7}\r\n'.encode())
    documents, _ = read(file, text_key="본문", id_key="번호")
    assert documents == [Document("a.jsonl:1", "하나", "a.jsonl"), Document("7", "둘", "a.jsonl")]
    table = parquet(tmp_path / "a.parquet", {"본문": ["하나", "둘"], "번호": [None, 7]})
    documents, _ = read(table, text_key="본문", id_key="번호")
    assert documents == [Document("a.parquet:1", "하나", "a.parquet"), Document("7", "둘", "a.parquet")]


def test_expand_sorts_and_takes_globs_folders_and_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "속").mkdir()
    names = ["b.jsonl", "a.txt", "속/c.jsonl.gz", "README.md", "이상한[1].txt"]
    for name in names:
        (tmp_path / name).write_text("가")
    files = [str(tmp_path / name) for name in sorted(set(names) - {"README.md"})]
    assert expand([str(tmp_path)]) == sorted(files)
    assert expand([f"{tmp_path}/*.txt", f"{tmp_path}/a.txt"]) == [f"{tmp_path}/a.txt", f"{tmp_path}/이상한[1].txt"]
    assert expand([f"{tmp_path}/**/*.gz"]) == [f"{tmp_path}/속/c.jsonl.gz"]
    assert expand([f"{tmp_path}/이상한[1].txt"]) == [f"{tmp_path}/이상한[1].txt"]


def test_inputs_that_name_nothing_are_refused(tmp_path: Path) -> None:
    for pattern in (f"{tmp_path}/없음.jsonl", f"{tmp_path}/*.jsonl", str(tmp_path)):
        with pytest.raises(ValueError, match="inputs=.*no such file"):
            expand([pattern])
    with pytest.raises(ValueError, match="inputs=.*at least one"):
        expand([])


def test_unknown_ending_is_named_before_anything_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "글".encode())
    file = write(tmp_path / "b.doc", "글".encode())
    with pytest.raises(ValueError, match=r"b\.doc: unknown ending, must be one of \.txt"):
        next(read_documents([str(tmp_path / "a.txt"), str(file)], counts=ReadCounts()))


GOOD = '{"text": "좋은 줄"}'.encode()
BAD_LINES = {
    "not UTF-8": (b'{"text": "\xff\xfe"}', "not UTF-8"),
    "cp949": ('{"text": "안녕"}'.encode("cp949"), "reads as CP949"),
    "broken JSON": (b'{"text": "a"', "broken JSON"),
    "deep JSON": (b"[" * 100_000, "broken JSON"),
    "no object": (b'["text"]', "one JSON object, not a list"),
    "no text": (b'{"body": "a"}', "no field text_key=text among body"),
    "null text": (b'{"text": null}', "field text must be a string, not NoneType"),
    "surrogate": (rb'{"text": "a\ud800"}', "lone surrogate at character 1"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_stop_or_are_skipped(tmp_path: Path, name: str) -> None:
    bad, message = BAD_LINES[name]
    file = write(tmp_path / "나쁜.jsonl", b"\n".join([GOOD, bad, GOOD]))
    with pytest.raises(ValueError, match=message) as error:
        read(file)
    assert f"{file}:2: " in str(error.value)
    assert "\n" not in str(error.value)
    documents, counts = read(file, skip=True)
    assert [document.id for document in documents] == ["나쁜.jsonl:1", "나쁜.jsonl:3"]
    assert counts.skipped == 1


def test_a_txt_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "첫 줄\n둘째 줄\n".encode() + "셋째".encode("cp949"))
    with pytest.raises(ValueError, match=r"a\.txt:3: not UTF-8 \(byte 0x"):
        read(file)


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["truncated", "no such format", "flipped"])
def test_damaged_compression_stops_or_keeps_what_is_before_it(tmp_path: Path, ending: str, damage: str) -> None:
    compress = gzip.compress if ending == "gz" else zstandard.compress
    many = [{"text": f"문서 {n * n % 977} {n * 7919 % 104729}"} for n in range(20_000)]
    first, second = compress(lines(many)), bytearray(compress(lines(many)))
    if damage == "flipped":
        for position in range(len(second) // 2, len(second) // 2 + 40):
            second[position] ^= 0x55
    data = {"truncated": first + second[: len(second) // 2], "no such format": lines(many)}.get(damage, first + second)
    file = write(tmp_path / f"a.jsonl.{ending}", bytes(data))
    with pytest.raises(ValueError, match=rf"a\.jsonl\.{ending}:\d+: "):
        read(file)
    if damage == "truncated":
        documents, counts = read(file, skip=True)
        assert 20_000 < len(documents) < 40_000
        assert counts.skipped == 1
        assert documents[-1].text == many[len(documents) - 20_001]["text"]


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    file = parquet(tmp_path / "a.parquet", {"text": ["가"] * 100})
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"a\.parquet:1: truncated or damaged parquet"):
        read(file)
    other = parquet(tmp_path / "b.parquet", {"본문": ["가"]})
    with pytest.raises(ValueError, match=r"b\.parquet: no column text_key=text among 본문"):
        read(other)


def test_bad_parquet_rows_are_named_by_row(tmp_path: Path) -> None:
    nulls = parquet(tmp_path / "a.parquet", {"text": ["가", None, "나"]})
    with pytest.raises(ValueError, match=r"a\.parquet:2: field text must be a string, not NoneType"):
        read(nulls)
    assert [document.text for document in read(nulls, skip=True)[0]] == ["가", "나"]
    raw = pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet:2: not UTF-8"):
        read(tmp_path / "b.parquet")


def test_empty_texts_are_counted_and_a_corpus_of_them_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", lines([{"text": ""}, {"text": " \n"}, {"text": "가"}]))
    assert read(file)[1].empty == 2
    for data in (b"", lines([{"text": ""}])):
        write(file, data)
        with pytest.raises(ValueError, match="inputs=.* hold no text"):
            read(file)
    write(file, b"{")
    with pytest.raises(ValueError, match="hold no text: 1 files, 0 empty documents, 1 skipped"):
        read(file, skip=True)


def test_reading_is_streamed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", lines() + b"{broken\n")
    stream = read_documents([str(file)], counts=ReadCounts())
    assert next(stream).id == "문서-0"  # the broken line is not reached yet


def test_a_url_of_another_file_system(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://말뭉치/a.jsonl.gz", "wb") as file:
        file.write(gzip.compress(lines()))
    documents, _ = read("memory://말뭉치/*.gz")
    assert len(documents) == 50
