"""The special tokens: the one place where they are named. `tokenizer/README.md` explains them.

Control symbols exist as ids only: their literals in a text are ordinary characters. User-defined symbols are parsed
from text, each always as one id.
"""

from __future__ import annotations

END_OF_DOCUMENT = "<|endoftext|>"  # ends every document and every answer; also the padding
SEPARATOR = "<|sep|>"
CONTROL_SYMBOLS = (END_OF_DOCUMENT, SEPARATOR)

# What cleaning writes in place of account, resident registration and telephone numbers.
MASK_TOKENS = ("<|acc|>", "<|rrn|>", "<|tel|>")
NEWLINE = "\n"
USER_DEFINED_SYMBOLS = (*MASK_TOKENS, NEWLINE)

UNKNOWN = "<unk>"  # SentencePiece wants one; with byte fallback no text ever yields it

END_OF_DOCUMENT_ID = 0
UNKNOWN_ID = 1
NUM_BYTES = 256  # SentencePiece spells them <0x00> to <0xFF>

# Ids that every tokenizer has before its first piece of text.
NUM_FIXED_PIECES = len(CONTROL_SYMBOLS) + len(USER_DEFINED_SYMBOLS) + NUM_BYTES + len((UNKNOWN,))
