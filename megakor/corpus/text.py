"""The normal form of text: Unicode NFC, free of the one character that SentencePiece keeps for itself.

Every text passes through `normalize` exactly once before it is counted, hashed or tokenised; a second pass changes
nothing. Nothing else is folded: compatibility characters (㎡, ㅋㅋ), hanja, spaces, tabs and newlines stay.
"""

from __future__ import annotations

import unicodedata

# SentencePiece writes a space as U+2581 and decodes every U+2581 as a space, so a real one could not come back.
RESERVED = "\u2581"
REPLACEMENT = "_"


def normalize(text: str) -> tuple[str, int]:
    """NFC with each `▁` (U+2581) replaced by `_`; returns the text and the number of characters replaced."""
    replaced = text.count(RESERVED)
    if replaced:
        text = text.replace(RESERVED, REPLACEMENT)
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    return text, replaced
