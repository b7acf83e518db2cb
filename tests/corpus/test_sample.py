"""The packaged sample: enough of it, in normal form, and no two documents alike."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megakor.corpus.reader import sample_files, sample_pairs_file
from megakor.corpus.text import normalize


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    return [json.loads(line) for file in sample_files() for line in Path(file).read_text("utf-8").splitlines()]


def test_size(documents: list[dict]) -> None:
    assert len(documents) >= 150
    assert sum(len(document["text"].encode()) for document in documents) >= 150_000
    assert len(Path(sample_pairs_file()).read_text("utf-8").splitlines()) >= 100


def test_it_is_korean_in_normal_form_with_ids(documents: list[dict]) -> None:
    assert len({document["id"] for document in documents}) == len(documents)
    for document in documents:
        text = document["text"]
        assert normalize(text) == (text, 0), document["id"]
        letters = [letter for letter in text if letter.isalpha()]
        hangul = sum("가" <= letter <= "힣" for letter in letters)
        assert hangul / len(letters) > 0.8, document["id"]


def test_it_has_what_korean_text_has(documents: list[dict]) -> None:
    text = "\n".join(document["text"] for document in documents)
    assert re.search(r"[一-龥]", text)
    assert re.search(r"[A-Za-z]{2}", text)
    assert re.search(r"\d", text)
    assert "\n" in documents[0]["text"] or "\n" in text


def test_no_two_documents_share_a_sentence_or_much_of_their_words(documents: list[dict]) -> None:
    seen: dict[str, str] = {}
    trigrams: list[tuple[str, set[tuple[str, ...]]]] = []
    for document in documents:
        for sentence in re.split(r"[.!?\n]", document["text"]):
            sentence = sentence.strip()
            if len(sentence) >= 15:
                assert seen.setdefault(sentence, document["id"]) == document["id"], sentence
        words = document["text"].split()
        trigrams.append((document["id"], set(zip(words, words[1:], words[2:], strict=False))))
    for index, (name, own) in enumerate(trigrams):
        for other_name, other in trigrams[:index]:
            shared = len(own & other) / min(len(own), len(other))
            assert shared < 0.05, (name, other_name, shared)


def test_licence_travels_with_it() -> None:
    licence = Path(sample_pairs_file()).with_name("LICENSE").read_text("utf-8")
    assert "CC0 1.0 Universal" in licence
