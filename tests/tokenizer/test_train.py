from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from megakor.config.schema import OnError, TokenizerKind, TrainTokenizerConfig
from megakor.tokenizer import Tokenizer, special
from megakor.tokenizer import train as module
from megakor.tokenizer.train import default_vocab_size, num_required_characters, train_tokenizer

from .conftest import documents, write_corpus

TOP = Path(__file__).parents[2]
KINDS = pytest.mark.parametrize("kind", list(TokenizerKind), ids=lambda kind: kind.name)


def train(corpus: Path | str, out: Path, **values: Any) -> Tokenizer:
    return train_tokenizer(TrainTokenizerConfig(inputs=[str(corpus)], out=str(out), **values))


@KINDS
def test_meta_tells_what_was_trained_on(corpus_file: Path, tmp_path: Path, kind: TokenizerKind) -> None:
    tokenizer = train(corpus_file, tmp_path, kind=kind, vocab_size=420)
    meta = json.loads((tmp_path / "tokenizer.meta.json").read_text())
    assert meta == tokenizer.meta
    assert meta["fingerprint"] == tokenizer.fingerprint
    assert (meta["kind"], meta["vocab_size"], tokenizer.vocab_size) == (kind.name, 420, 420)
    texts = documents(150)
    assert meta["trained_on"]["bytes"] == sum(len(text.encode()) for text in texts)
    assert meta["trained_on"]["documents"] == 150
    assert meta["trained_on"]["characters"] == sum(map(len, texts))
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert meta["figures"]["tokens"] == tokens
    assert meta["figures"]["bytes_per_token"] == pytest.approx(meta["trained_on"]["bytes"] / tokens)
    assert meta["options"]["normalization_rule_name"] == "identity"
    assert meta["options"]["byte_fallback"] is True
    assert meta["special_tokens"]["<|tel|>"] == tokenizer.special_id("<|tel|>")
    assert {file.name for file in tmp_path.iterdir()} == {"tokenizer.model", "tokenizer.meta.json"}


@KINDS
def test_training_is_repeatable(corpus_file: Path, tmp_path: Path, kind: TokenizerKind) -> None:
    first, second = (train(corpus_file, tmp_path / name, kind=kind, vocab_size=400) for name in "ab")
    assert first.fingerprint == second.fingerprint


def test_words_become_pieces_and_literals_do_not(tokenizer: Tokenizer) -> None:
    pieces = {tokenizer.piece(index) for index in range(special.NUM_FIXED_PIECES, tokenizer.vocab_size)}
    assert "▁대한민국" in pieces
    assert "▁도서관" in pieces
    assert not [piece for piece in pieces if re.search(r"[\n\r\t\0▅]|<\|(tel|endoftext)|<0x4", piece)]


@KINDS
def test_the_required_characters_are_counted_as_the_trainer_does(tmp_path: Path, kind: TokenizerKind) -> None:
    texts = ["".join(chr(0xAC00 + (n * n) % 700) for n in range(start, start + 60)) + " 가나\n" for start in range(300)]
    corpus = write_corpus(tmp_path / "a.jsonl", texts)
    for coverage in (0.98, 0.9995, 1.0):
        with pytest.raises(ValueError, match="vocab_size=264") as error:
            train(corpus, tmp_path / "no", kind=kind, vocab_size=264, character_coverage=coverage)
        smallest = int(re.search(r"vocab_size=264 must be at least (\d+) for this text", str(error.value))[1])
        if kind is TokenizerKind.bpe:  # the smallest works, and SentencePiece itself refuses one less
            train(corpus, tmp_path / "yes", vocab_size=smallest, character_coverage=coverage)
            with (
                pytest.MonkeyPatch.context() as patch,
                pytest.raises(ValueError, match=f"{smallest - 1} vs {smallest}"),
            ):
                patch.setattr(module, "num_required_characters", lambda *_: 1)
                train(corpus, tmp_path / "no", vocab_size=smallest - 1, character_coverage=coverage)
    assert not (tmp_path / "no").exists()


def test_coverage_leaves_out_the_rarest() -> None:
    frequencies = Counter({"가": 90, "나": 8, "다": 1, "라": 1})
    assert [num_required_characters(frequencies, share) for share in (0.9, 0.98, 0.985, 1.0)] == [1, 2, 3, 4]


@KINDS
def test_too_large_names_the_largest_possible(corpus_file: Path, tmp_path: Path, kind: TokenizerKind) -> None:
    with pytest.raises(ValueError, match=r"^vocab_size=500000 must be at most \d+: this text yields no more") as error:
        train(corpus_file, tmp_path, kind=kind, vocab_size=500_000)
    largest = int(re.search(r"at most (\d+)", str(error.value))[1])
    assert train(corpus_file, tmp_path, kind=kind, vocab_size=largest).vocab_size == largest
    with pytest.raises(ValueError, match=f"must be at most {largest}"):
        train(corpus_file, tmp_path, kind=kind, vocab_size=largest + 1)


@pytest.mark.parametrize("vocab_size", [0, -5, 100, 263])
def test_smaller_than_bytes_and_special_tokens_is_refused(corpus_file: Path, tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(ValueError, match=rf"^vocab_size={vocab_size} must be above 263: 256 bytes, 7 special tokens"):
        train(corpus_file, tmp_path, vocab_size=vocab_size)


def test_more_ids_than_uint16_holds(tmp_path: Path) -> None:
    words = ["".join(chr(0xAC00 + (n * k) % 11172) for k in (1, 7919, 104729, 1299709)) for n in range(25_000)]
    texts = [" ".join(words[start : start + 1000]) for start in range(0, len(words), 1000)]
    tokenizer = train(write_corpus(tmp_path / "a.jsonl", texts), tmp_path, vocab_size=70_000)
    assert tokenizer.vocab_size == 70_000
    assert max(max(tokenizer.encode(text)) for text in texts) > 65_535
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)


@KINDS
@pytest.mark.parametrize("text", ["가", "가나다", "가나다 가나다 가나다\n" * 20, "안녕하세요. 반갑습니다! " * 200])
def test_null_is_sized_to_any_text(tmp_path: Path, kind: TokenizerKind, text: str) -> None:
    tokenizer = train(write_corpus(tmp_path / "a.jsonl", [text]), tmp_path, kind=kind)
    assert tokenizer.vocab_size > special.NUM_FIXED_PIECES
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_default_vocab_size_grows_with_the_text() -> None:
    assert [default_vocab_size(size, 1000) for size in (250_000, 4_000_000, 10**9)] == [2000, 8000, 30_000]
    assert default_vocab_size(1000, 300) == 375
    assert default_vocab_size(10**9, 40_000) == 50_000


@KINDS
def test_the_trainer_is_quiet(
    corpus_file: Path, tmp_path: Path, kind: TokenizerKind, capfd: pytest.CaptureFixture[str]
) -> None:
    train(corpus_file, tmp_path, kind=kind, vocab_size=400)
    with pytest.raises(ValueError, match="vocab_size"):
        train(corpus_file, tmp_path, kind=kind, vocab_size=100_000)
    written = capfd.readouterr()
    assert written.out == ""
    foreign = [line for line in written.err.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert foreign == []


def test_long_lines_are_learnt_from(tmp_path: Path) -> None:
    line = " ".join(["긴줄에서만나오는낱말"] * 20_000)  # 640 kB, SentencePiece's own limit is 4,192 bytes
    tokenizer = train(write_corpus(tmp_path / "a.jsonl", [line]), tmp_path)
    assert "▁긴줄에서만나오는낱말" in {tokenizer.piece(index) for index in range(tokenizer.vocab_size)}
    assert tokenizer.meta["trained_on"]["bytes"] == len(line.encode())


def test_lines_with_reserved_characters_are_learnt_from(tmp_path: Path) -> None:
    line = "▅표\t대한민국 서울\0특별시\r"
    tokenizer = train(write_corpus(tmp_path / "a.jsonl", [line] * 50), tmp_path)
    assert "대한민국" in {tokenizer.piece(index) for index in range(tokenizer.vocab_size)}
    assert tokenizer.decode(tokenizer.encode(line)) == line


def test_max_bytes_takes_from_all_files(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a.jsonl", documents(100))
    write_corpus(tmp_path / "b.jsonl", ["뒤파일에만있는말 " * 30] * 100)
    tokenizer = train(f"{tmp_path}/*.jsonl", tmp_path / "out", max_bytes=20_000)
    assert 15_000 <= tokenizer.meta["trained_on"]["bytes"] <= 20_000
    assert tokenizer.encode("말 뒤파일에만있는말")[-1] >= special.NUM_FIXED_PIECES
    assert len(tokenizer.encode(" 뒤파일에만있는말")) == 1


def test_bad_input_is_an_error_or_skipped(corpus_file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(corpus_file.read_bytes() + b'{"text": "\xff"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:151: not UTF-8"):
        train(bad, tmp_path)
    assert train(bad, tmp_path, on_error=OnError.skip).meta["trained_on"]["skipped"] == 2
    bad.write_text(" \n")
    with pytest.raises(ValueError, match="hold no text"):
        train(bad, tmp_path)
    write_corpus(bad, ["\u2585\u2585"])
    with pytest.raises(ValueError, match="hold no text to learn from"):
        train(bad, tmp_path)


def test_an_error_while_the_trainer_reads_is_not_lost(corpus_file: Path, tmp_path: Path) -> None:
    def broken() -> Any:
        yield "한 줄"
        raise ValueError("a.jsonl:7: changed meanwhile")

    config = TrainTokenizerConfig(inputs=[str(corpus_file)], out=str(tmp_path), vocab_size=400)
    with pytest.raises(ValueError, match=r"^a\.jsonl:7: changed meanwhile$"):
        module._run_trainer(module._options(config, 400), broken())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"character_coverage": 0.5}, "character_coverage=0.5 must be between 0.98 and 1"),
        ({"character_coverage": 1.1}, "character_coverage=1.1 must be"),
        ({"num_threads": 0}, "num_threads=0 must be at least 1"),
        ({"max_bytes": 0}, "max_bytes=0 must be at least 1"),
        ({"vocab_size": 1 << 31}, "vocab_size=2147483648 must be below"),
    ],
)
def test_bad_values_are_named(corpus_file: Path, tmp_path: Path, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(corpus_file, tmp_path, **values)


def test_a_failed_training_leaves_the_last_tokenizer(corpus_file: Path, tmp_path: Path) -> None:
    before = train(corpus_file, tmp_path, vocab_size=400).fingerprint
    with pytest.raises(ValueError, match="vocab_size"):
        train(corpus_file, tmp_path, vocab_size=500_000)
    assert Tokenizer.load(tmp_path).fingerprint == before


@pytest.mark.parametrize("recipe", sorted((TOP / "tokenizer" / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_fit_the_schema(recipe: Path) -> None:
    assert recipe.read_text().startswith("# @package _global_\n")
    values = OmegaConf.load(recipe)
    config = OmegaConf.merge(OmegaConf.structured(TrainTokenizerConfig(inputs=["a"], out="b")), values)
    module._check(OmegaConf.to_object(config))
    assert f"`{recipe.stem}`" in (TOP / "tokenizer" / "README.md").read_text()


def test_the_readme_tells_the_ids(tokenizer: Tokenizer) -> None:
    readme = (TOP / "tokenizer" / "README.md").read_text().replace(r"\|", "|").replace(r"\n", "\n")
    for index in range(special.NUM_FIXED_PIECES - special.NUM_BYTES):
        assert f"| {index} | `{tokenizer.piece(index)}` |" in readme
    first, last = special.NUM_FIXED_PIECES - special.NUM_BYTES, special.NUM_FIXED_PIECES - 1
    assert f"| {first} to {last} | `<0x00>` to `<0xFF>` |" in readme
