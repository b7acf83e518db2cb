from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakor.corpus.reader import Document
from megakor.corpus.thin import cut, thin


def corpus(sizes: list[int], name: str = "a") -> list[Document]:
    return [Document(f"{name}{n}", "x" * (size - 1) + "\n", name) for n, size in enumerate(sizes)]


def thinned(documents: list[Document], max_bytes: int | None) -> list[Document]:
    total = sum(len(document.text.encode()) for document in documents)
    return list(thin(documents, total_bytes=total, max_bytes=max_bytes))


def num_bytes(documents: list[Document], source: str | None = None) -> int:
    return sum(len(document.text.encode()) for document in documents if source in (None, document.source))


def test_a_corpus_within_the_cap_is_whole() -> None:
    documents = corpus([10, 20, 30])
    assert thinned(documents, None) == documents
    assert thinned(documents, 60) == documents


def test_every_source_gives_the_same_share() -> None:
    documents = corpus([100] * 2000, "short") + corpus([5000] * 100, "long") + corpus([700] * 50, "few")
    kept = thinned(documents, 73_500)  # a tenth
    assert 0.99 * 73_500 <= num_bytes(kept) <= 73_500
    for source in ("short", "long", "few"):
        assert num_bytes(kept, source) / num_bytes(documents, source) == pytest.approx(0.1, abs=0.06)
    assert kept == thinned(documents, 73_500)


def test_long_documents_are_shortened_at_a_line_border() -> None:
    document = Document("책", "가나다라\n" * 10_000, "책")
    (kept,) = thinned([document], 1000)
    assert kept.text == "가나다라\n" * (1000 // 13)
    assert kept.id == "책"


def test_cut_prefers_lines_then_spaces_then_characters() -> None:
    assert cut("가나\n다라\n마", 14) == "가나\n다라\n"
    assert cut("가나 다라 마", 14) == "가나 다라 "
    assert cut("가나다라", 7) == "가나"
    assert cut("가나", 6) == "가나"
    assert cut("가", 2) == ""


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 3000))
def test_never_more_than_the_cap(sizes: list[int], max_bytes: int) -> None:
    documents = corpus(sizes)
    kept = thinned(documents, max_bytes)
    assert num_bytes(kept) <= max_bytes
    originals = {document.id: document.text for document in documents}
    assert all(originals[document.id].startswith(document.text) for document in kept)


def test_a_cap_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes=0 must be at least 1"):
        thinned(corpus([10]), 0)
