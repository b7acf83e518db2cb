"""The tokenizer: text to ids and back. A folder with `tokenizer.model` and `tokenizer.meta.json` becomes a `Tokenizer`.

For every valid text without U+2581, `decode(encode(text))` is its NFC form: whatever the vocabulary lacks is spelt in
bytes. Every id produced is below `vocab_size`, and no text yields a control symbol.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from megakor.corpus.text import RESERVED, normalize
from megakor.tokenizer.special import CONTROL_SYMBOLS, END_OF_DOCUMENT, NEWLINE, SEPARATOR, USER_DEFINED_SYMBOLS

MODEL_FILE = "tokenizer.model"
META_FILE = "tokenizer.meta.json"

# Texts are encoded in blocks that end at a newline, which as a symbol of its own is a border of every segmentation.
# With BPE the ids are those of the whole text, and longer blocks are as good. A unigram model breaks ties (`▁` `▁▁▁` or
# `▁▁▁` `▁`) by rounding errors that grow with what stands before, so there each line is a block, and equal lines have
# equal ids.
BLOCK_SIZE = {"bpe": 1 << 13, "unigram": 0}  # characters; a block ends at the first newline past them


def fingerprint(model_proto: bytes) -> str:
    """What identifies a tokenizer: the SHA-256 of its `tokenizer.model`."""
    return hashlib.sha256(model_proto).hexdigest()


class Tokenizer:
    """A trained tokenizer. Picklable; safe to use from several threads."""

    def __init__(self, model_proto: bytes, folder: Path, meta: dict[str, Any]) -> None:
        self.folder = folder
        self.meta = meta
        self._model_proto = model_proto
        self._block_size = BLOCK_SIZE[meta["kind"]]
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
        for symbol in (*CONTROL_SYMBOLS, *USER_DEFINED_SYMBOLS):
            self.special_id(symbol)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a tokenizer's folder. `FileNotFoundError` where a file is missing, `ValueError` where one is damaged or
        the two do not belong together."""
        folder = Path(folder)
        for name in (MODEL_FILE, META_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"tokenizer={folder} holds no {name}; `megakor train-tokenizer` writes it")
        model_proto = (folder / MODEL_FILE).read_bytes()
        try:
            meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
            expected = meta["fingerprint"]
            if meta["kind"] not in BLOCK_SIZE:
                raise ValueError(f"kind={meta['kind']} must be one of {', '.join(BLOCK_SIZE)}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / META_FILE} is damaged: {error!r}") from error
        if fingerprint(model_proto) != expected:
            raise ValueError(
                f"{folder / MODEL_FILE} has SHA-256 {fingerprint(model_proto)}, but {META_FILE} beside it belongs to "
                f"fingerprint={expected}: one of the two is damaged or from another tokenizer"
            )
        return cls(model_proto, folder, meta)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self._model_proto, self.folder, self.meta)

    # ------------------------------------------------------------------------------------------------ text and ids

    def encode(self, text: str) -> list[int]:
        """The ids of the text's normal form. `ValueError` where it holds a lone surrogate."""
        text, _ = normalize(text)
        if not text.isascii():
            _check_encodable(text)
        ids: list[int] = []
        for block in _blocks(text, self._block_size):
            ids += self._processor.encode(block)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids. Control symbols are nothing; bytes that are not UTF-8 are U+FFFD. `ValueError` where
        an id is not in the vocabulary."""
        ids = [int(index) for index in ids]
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"ids: {index} must be at least 0 and below vocab_size={self.vocab_size}")
        return self._processor.decode(ids)

    # ---------------------------------------------------------------------------------------------- the vocabulary

    @cached_property
    def vocab_size(self) -> int:
        """The true vocabulary: one more than the greatest id."""
        return self._processor.vocab_size()

    @cached_property
    def eod_id(self) -> int:
        """`<|endoftext|>`: ends documents and answers, and pads."""
        return self.special_id(END_OF_DOCUMENT)

    @cached_property
    def sep_id(self) -> int:
        """`<|sep|>`."""
        return self.special_id(SEPARATOR)

    @cached_property
    def newline_id(self) -> int:
        """The newline."""
        return self.special_id(NEWLINE)

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of `tokenizer.model`."""
        return fingerprint(self._model_proto)

    def special_id(self, symbol: str) -> int:
        """The id of a special token. `ValueError` where the vocabulary lacks it."""
        index = self._processor.piece_to_id(symbol)
        if self._processor.id_to_piece(index) != symbol:
            raise ValueError(f"{self.folder / MODEL_FILE} has no special token {symbol!r}: not a tokenizer of megakor")
        return index

    def piece(self, index: int) -> str:
        """SentencePiece's own spelling of an id: `▁` for a space, `<0x0A>` for a byte."""
        return self._processor.id_to_piece(index)

    def is_byte(self, index: int) -> bool:
        """Whether an id is one of the 256 bytes that spell what the vocabulary lacks."""
        return self._processor.is_byte(index)

    def model_proto(self) -> bytes:
        """The content of `tokenizer.model`."""
        return self._model_proto

    def num_bytes_per_id(self) -> np.ndarray:
        """UTF-8 bytes that each id decodes to, control symbols 0.  # [vocab_size] int64"""
        processor = self._processor
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for index in range(self.vocab_size):
            if processor.is_byte(index):
                sizes[index] = 1
            elif not processor.is_control(index) and not processor.is_unknown(index):
                sizes[index] = len(processor.id_to_piece(index).replace(RESERVED, " ").encode())
        return sizes


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}: no Unicode text"
        ) from error


def _blocks(text: str, size: int) -> Iterator[str]:
    """Pieces of at least `size` characters, each but the last ending in a newline; their sum is `text`."""
    start = 0
    while start < len(text):
        newline = text.find(NEWLINE, start + size)
        end = len(text) if newline < 0 else newline + 1
        yield text[start:end]
        start = end
