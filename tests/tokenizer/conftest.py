"""One small tokenizer of each kind, trained on a text made here."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megakor.config.schema import TokenizerKind, TrainTokenizerConfig
from megakor.tokenizer import Tokenizer
from megakor.tokenizer.train import train_tokenizer

STEMS = ["학교", "사람", "나라", "바다", "하늘", "시간", "마음", "이야기", "도서관", "고양이"]
STEMS += ["자전거", "컴퓨터", "대한민국", "서울특별시", "아침", "저녁"]
ENDINGS = ["은", "는", "이", "가", "을", "를", "에서", "으로", "까지", "부터", "입니다", "했다", "하고", "보다", ""]
ODD = [
    "2024년",
    "㎡",
    "漢字",
    "ㅋㅋㅋ",
    "😀",
    "English",
    "  ",
    "\t",
    "▅",
    "\r",
    "\0",
    "<|tel|>",
    "<|endoftext|>",
    "<0x41>",
]


def documents(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)

    def word() -> str:
        if generator.random() < 0.08:
            return generator.choice(ODD)
        return generator.choice(STEMS) + generator.choice(ENDINGS)

    return ["\n".join(" ".join(word() for _ in range(12)) for _ in range(8)) for _ in range(count)]


def write_corpus(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "글.jsonl", documents(150))


@pytest.fixture(scope="session", params=list(TokenizerKind), ids=lambda kind: kind.name)
def tokenizer(request: pytest.FixtureRequest, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    out = tmp_path_factory.mktemp("tokenizer") / request.param.name
    config = TrainTokenizerConfig(inputs=[str(corpus_file)], out=str(out), kind=request.param, vocab_size=450)
    train_tokenizer(config)
    return Tokenizer.load(out)
