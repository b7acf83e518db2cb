"""Instruction files: which rows become pairs, and what a bad one says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megakor.config.schema import OnError, PairsConfig
from megakor.corpus.reader import sample_pairs_file
from megakor.instruct.pairs import Pair, read_pairs, split

ALPACA = {"instruction": "수도는?", "input": "대한민국", "output": "서울입니다."}


def write(path: Path, *rows: dict | bytes) -> str:
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    data = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def test_alpaca_and_question_answer_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", ALPACA, {"question": "안녕?", "answer": "네, 안녕하세요."})
    assert read_pairs(PairsConfig(files=[file])) == [
        Pair("수도는?", "대한민국", "서울입니다."),
        Pair("안녕?", "", "네, 안녕하세요."),
    ]


def test_gzip_and_csv(tmp_path: Path) -> None:
    packed = write(tmp_path / "a.jsonl.gz", ALPACA)
    table = tmp_path / "b.csv"
    table.write_text('Q,A,label\n"12시, 땡!",하루가 또 가네요.,0\n', encoding="utf-8")
    assert read_pairs(PairsConfig(files=[packed, str(table)])) == [
        Pair("수도는?", "대한민국", "서울입니다."),
        Pair("12시, 땡!", "", "하루가 또 가네요."),
    ]


def test_duplicates_count_once(tmp_path: Path) -> None:
    assert len(read_pairs(PairsConfig(files=[write(tmp_path / "a.jsonl", ALPACA, ALPACA)]))) == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b"{broken", "broken JSON"),
        (b'{"instruction": "\xb0\xa1"}', "not UTF-8"),
        (b'["list"]', "must be a JSON object"),
        ({"instruction": "q"}, "output/answer/a/response=None must be a text"),
        ({"instruction": "q", "output": "  "}, "must be a text that is not empty"),
        ({"instruction": 3, "output": "a"}, "instruction/question/q=3 must be a text"),
    ],
)
def test_a_bad_row_stops_with_its_line_or_is_skipped(tmp_path: Path, row: dict | bytes, words: str) -> None:
    file = write(tmp_path / "a.jsonl", ALPACA, row)
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2: ") as caught:
        read_pairs(PairsConfig(files=[file]))
    assert words in str(caught.value)
    assert len(read_pairs(PairsConfig(files=[file], on_error=OnError.skip))) == 1


def test_csv_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("Q,A\n질문,답\n".encode("cp949"))
    with pytest.raises(ValueError, match=r"a\.csv: .*not UTF-8"):
        read_pairs(PairsConfig(files=[str(tmp_path / "a.csv")]))


def test_other_endings_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.jsonl"):
        read_pairs(PairsConfig(files=[write(tmp_path / "a.json", ALPACA)]))
    with pytest.raises(ValueError, match="must hold at least one pair"):
        read_pairs(PairsConfig(files=[write(tmp_path / "b.jsonl")]))


def test_sample_pairs_are_at_least_a_hundred_distinct_ones() -> None:
    pairs = read_pairs(PairsConfig())
    assert len(pairs) >= 100
    assert len({pair.answer for pair in pairs}) == len(pairs)
    with Path(sample_pairs_file()).open(encoding="utf-8") as file:
        assert sum(1 for _ in file) == len(pairs)


def test_split_does_not_move_pairs_when_others_come() -> None:
    pairs = [Pair(f"질문 {index}", "", "답") for index in range(400)]
    kept, held_out = split(pairs, 0.1)
    assert sorted(kept + held_out, key=pairs.index) == pairs
    assert 20 <= len(held_out) <= 60
    _, fewer = split(pairs[:200], 0.1)
    assert fewer == [pair for pair in held_out if pair in pairs[:200]]
    assert split(pairs, 0.0) == (pairs, [])
    with pytest.raises(ValueError, match=r"pairs\.validation_ratio=1\.0 must leave pairs"):
        split(pairs, 1.0)
