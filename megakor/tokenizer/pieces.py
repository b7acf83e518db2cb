"""What SentencePiece's trainer gets to see: a text in, pieces of bounded length out, whose sum is the text.

The trainer drops a whole line that is too long or holds U+2585, strips carriage returns, and treats a tab as its own
border mark. So the text is cut at these characters, at newlines and at the literals of special tokens, none of which
may become part of a learnt piece; and long lines are cut before a space, where words part anyway.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megakor.tokenizer.special import CONTROL_SYMBOLS, MASK_TOKENS, UNKNOWN

MAX_CHARACTERS = 4096
MAX_SENTENCE_LENGTH = 4 * MAX_CHARACTERS  # bytes

_BORDER_CHARACTERS = "\n\r\t\0\u2585"
_LITERALS = "|".join(re.escape(literal) for literal in (*CONTROL_SYMBOLS, *MASK_TOKENS, UNKNOWN))
_BORDER = re.compile(f"(<0x[0-9A-F]{{2}}>|{_LITERALS}|[{_BORDER_CHARACTERS}]+)")


def training_pieces(text: str) -> Iterator[tuple[str, bool]]:
    """(piece, does the trainer see it); the others are borders, encoded by symbols or bytes of their own."""
    for number, part in enumerate(_BORDER.split(text)):
        if number % 2:
            yield part, False
            continue
        while len(part) > MAX_CHARACTERS:
            end = _last_word_border(part)
            yield part[:end], True
            part = part[end:]
        if part:
            yield part, True


def _last_word_border(part: str) -> int:
    """The greatest border within `MAX_CHARACTERS` that has a space behind it and none before it."""
    end = part.rfind(" ", 1, MAX_CHARACTERS + 1)
    while end > 0 and part[end - 1] == " ":
        end -= 1
    return end if end > 0 else MAX_CHARACTERS
