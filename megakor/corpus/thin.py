"""A share of a corpus, taken evenly: documents in, fewer documents out, the same ones every time.

The share flows like a budget: every document that passes adds `share × its bytes`, and a document is kept while the
budget lasts. So each file, and each part of a file, gives the same share, whatever the order or the lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from megakor.corpus.reader import Document

# A document longer than this part of the cap is shortened to its share instead of being kept or left out whole.
LONG = 0.1


def thin(documents: Iterable[Document], *, total_bytes: int, max_bytes: int | None) -> Iterator[Document]:
    """At most `max_bytes` (UTF-8) of `documents`, which hold `total_bytes`; null: all of them.

    Long documents (over a tenth of `max_bytes`) are cut at a line border, or inside a line where one line is longer
    than its share.
    """
    if max_bytes is None or total_bytes <= max_bytes:
        yield from documents
        return
    if max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes} must be at least 1, or null for all")
    share = max_bytes / total_bytes
    budget = 0.0
    kept = 0
    for document in documents:
        data = document.text.encode()
        if len(data) > LONG * max_bytes:
            text = cut(document.text, int(share * len(data)))
            document, size = replace(document, text=text), len(text.encode())
        else:
            size = len(data)
            budget += share * size
            if budget <= 0:
                continue
            budget -= size
        if size and document.text.strip() and kept + size <= max_bytes:
            kept += size
            yield document


def cut(text: str, num_bytes: int) -> str:
    """The longest beginning of `text` within `num_bytes` of UTF-8 that ends at a line border; if there is none, at a
    space; if there is none either, at a character."""
    head = text.encode()[:num_bytes].decode(errors="ignore")
    if len(head) == len(text):
        return text
    end = max(head.rfind("\n"), head.rfind(" ") if "\n" not in head else -1)
    return head[: end + 1] if end >= 0 else head
