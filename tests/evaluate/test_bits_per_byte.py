"""Bits per byte against sums done by hand."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from megakor.evaluate.bits_per_byte import order0_bits, unigram_bits


class Tokens(SimpleNamespace):
    """A token stream of a list."""

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def read(self, start: int, count: int) -> np.ndarray:
        return np.asarray(self.ids[start : start + count], dtype=np.int64)


def test_unigram_is_the_best_additively_smoothed_one() -> None:
    train, heldout = Tokens(ids=[1, 1, 1, 2, 2, 3]), Tokens(ids=[1, 2, 4])

    def by_hand(alpha: float) -> float:
        counts = {1: 3, 2: 2, 3: 1}
        return -sum(math.log2((counts.get(token, 0) + alpha) / (6 + 5 * alpha)) for token in heldout.ids)

    got = unigram_bits(train, heldout, num_tokens=5)  # type: ignore[arg-type]
    assert got == pytest.approx(min(by_hand(2.0**power) for power in range(-10, 5)))
    assert got < by_hand(2.0**-10)


def test_order0_is_the_entropy_of_the_bytes_without_document_ends() -> None:
    class Characters:
        eod_id = 0

        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    text = "가나가 가"
    heldout = Tokens(ids=[*map(ord, text[:2]), 0, *map(ord, text[2:]), 0])
    counts = Counter(text.encode())
    total = sum(counts.values())
    entropy = -sum(count * math.log2(count / total) for count in counts.values())
    assert order0_bits(heldout, Characters()) == pytest.approx(entropy)  # type: ignore[arg-type]


def test_nothing_is_needed_for_a_constant_text() -> None:
    heldout = Tokens(ids=[65] * 10)
    characters = SimpleNamespace(eod_id=0, decode=lambda ids: "".join(map(chr, ids)))
    assert order0_bits(heldout, characters) == 0.0  # type: ignore[arg-type]
