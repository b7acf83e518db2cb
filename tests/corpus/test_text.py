from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from megakor.corpus.text import normalize


def test_composes_jamo_and_folds_nothing_else() -> None:
    assert normalize("한국") == ("한국", 0)
    for kept in ("ㅋㅋ", "㎡", "①", "漢字", "  두  칸\t탭\n\n", "A", "\u3000", "😀👨‍👩‍👧"):
        assert normalize(kept) == (kept, 0)


def test_replaces_and_counts_the_reserved_character() -> None:
    assert normalize("가▁나▁▁") == ("가_나__", 3)


@given(st.text())
def test_is_nfc_and_idempotent(text: str) -> None:
    result, replaced = normalize(text)
    assert result == unicodedata.normalize("NFC", text.replace("▁", "_"))
    assert replaced == text.count("▁")
    assert normalize(result) == (result, 0)
