from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from megakor.tokenizer.pieces import MAX_CHARACTERS, MAX_SENTENCE_LENGTH, training_pieces

BORDERS = ["\n", "\t", "\r\n", "▅", "\0", "<|tel|>", "<|endoftext|>", "<0xAB>"]
TEXTS = st.lists(st.sampled_from([*BORDERS, " ", "  ", "<0x", "가" * 3000, "낱말"])).map("".join)


@given(st.one_of(st.text(), TEXTS))
def test_nothing_is_dropped_and_nothing_reserved_is_seen(text: str) -> None:
    pieces = list(training_pieces(text))
    assert "".join(piece for piece, _ in pieces) == text
    for piece, is_seen in pieces:
        if is_seen:
            assert 0 < len(piece) <= MAX_CHARACTERS
            assert 4 * len(piece) <= MAX_SENTENCE_LENGTH
            assert not re.search(r"[\n\r\t\0▅]|<\|tel\|>|<\|endoftext\|>|<unk>|<0x[0-9A-F]{2}>", piece)
        else:
            assert piece


def test_long_lines_are_cut_between_words() -> None:
    words = " ".join(["낱말들"] * 10_000)
    pieces = [piece for piece, _ in training_pieces(words)]
    assert len(pieces) > 5
    assert [word for piece in pieces for word in piece.split()] == words.split()
    assert all(piece.startswith(" ") for piece in pieces[1:])


def test_a_run_of_spaces_or_characters_without_a_border_is_cut_hard() -> None:
    for text in (" " * 10_000, "가" * 10_000):
        assert [len(piece) for piece, _ in training_pieces(text)] == [4096, 4096, 1808]
