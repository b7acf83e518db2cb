"""`megakor train-tokenizer`: text in; `tokenizer.model` (SentencePiece) and `tokenizer.meta.json` out.

    read ─► normalize ─► thin (max_bytes) ─► count the characters ─► size the vocabulary
                                         └─► cut into training pieces ─► SentencePiece ─► measure ─► write

The corpus is streamed once per pass; only SentencePiece holds it in memory. No byte is dropped.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from megakor.config.schema import TokenizerKind, TrainTokenizerConfig
from megakor.corpus.reader import Document, ReadCounts, expand, read_documents
from megakor.corpus.text import normalize
from megakor.corpus.thin import thin
from megakor.files import atomic_write
from megakor.logs import Progress, get_logger, progress
from megakor.tokenizer import special
from megakor.tokenizer.pieces import MAX_SENTENCE_LENGTH, training_pieces
from megakor.tokenizer.tokenizer import META_FILE, MODEL_FILE, Tokenizer, fingerprint

FORMAT_VERSION = 1
MEASURED_BYTES = 1_000_000  # the figures are taken on an even share of the text of at most this size
MAX_DEFAULT_VOCAB_SIZE = 30_000
LOG_ERRORS_ONLY = 2  # SentencePiece's minloglevel

log = get_logger(__name__)


def default_vocab_size(num_bytes: int, minimum: int) -> int:
    """The vocabulary for `num_bytes` of text whose special tokens, bytes and characters alone take `minimum` pieces.

    Vocabulary grows as the square root of the text (Heaps' law): 4 √bytes is 2,000 pieces for 250 kB, 8,000 for 4 MB
    and Polyglot-Ko's 30,000 from 56 MB on. A quarter of `minimum` always remains for pieces of more than one character.
    """
    return max(min(round(4 * math.sqrt(num_bytes)), MAX_DEFAULT_VOCAB_SIZE), minimum + minimum // 4)


@dataclass(frozen=True)
class _Source:
    """The text that the tokenizer is trained on, read anew in every pass."""

    config: TrainTokenizerConfig
    files: list[str]
    total_bytes: int = 0  # of all the text there is; known where max_bytes takes a share of it

    def documents(self, counts: ReadCounts) -> Iterator[Document]:
        """The documents in normal form, thinned to `max_bytes`."""
        return thin(self._all_documents(counts), total_bytes=self.total_bytes, max_bytes=self.config.max_bytes)

    def measured(self) -> _Source:
        """The same source, its total known if it is needed."""
        if self.config.max_bytes is None:
            return self
        reading = progress(self._all_documents(ReadCounts()), unit="documents", description="measuring the text")
        return replace(self, total_bytes=sum(len(document.text.encode()) for document in reading))

    def _all_documents(self, counts: ReadCounts) -> Iterator[Document]:
        config = self.config
        for document in read_documents(self.files, text_key=config.text_key, on_error=config.on_error, counts=counts):
            text, replaced = normalize(document.text)
            counts.replaced_u2581 += replaced
            yield replace(document, text=text)


@dataclass
class _Counted:
    """What the counting pass found."""

    documents: int = 0
    bytes: int = 0
    characters: int = 0
    read: ReadCounts = field(default_factory=ReadCounts)
    frequencies: Counter[str] = field(default_factory=Counter)  # of the characters that the trainer sees


class _VocabularyTooLarge(Exception):
    def __init__(self, largest: int) -> None:
        super().__init__(largest)
        self.largest = largest


def train_tokenizer(config: TrainTokenizerConfig) -> Tokenizer:
    """Train a tokenizer and write it to `config.out`; a tokenizer that is there is replaced.

    `ValueError`: bad input text, or a `vocab_size` that the text is too large or too small for.
    """
    _check(config)
    source = _Source(config, expand(config.inputs)).measured()
    text = _count(source)
    num_characters = num_required_characters(text.frequencies, config.character_coverage)
    minimum = special.NUM_FIXED_PIECES + num_characters
    if config.vocab_size is not None and config.vocab_size < minimum:
        raise ValueError(
            f"vocab_size={config.vocab_size} must be at least {minimum} for this text: {special.NUM_FIXED_PIECES} "
            f"bytes and special tokens, and {num_characters} characters at "
            f"character_coverage={config.character_coverage}; null sizes it to the text"
        )
    vocab_size = config.vocab_size or default_vocab_size(text.bytes, minimum)
    log.info("training %s on %s bytes: %s pieces", config.kind.name, f"{text.bytes:,}", f"{vocab_size:,}")
    options = _options(config, vocab_size)
    try:
        model_proto = _run_trainer(options, _sentences(source, text.bytes))
    except _VocabularyTooLarge as error:
        if config.vocab_size is not None:
            raise ValueError(
                f"vocab_size={config.vocab_size} must be at most {error.largest}: this text yields no more pieces; "
                f"null sizes it to the text"
            ) from None
        log.info("the text yields no more than %s pieces", f"{error.largest:,}")
        options["vocab_size"] = error.largest
        model_proto = _run_trainer(options, _sentences(source, text.bytes))
    if config.kind is TokenizerKind.unigram:
        model_proto = with_exact_scores(model_proto)
    return _write(source, model_proto, options, text)


def with_exact_scores(model_proto: bytes) -> bytes:
    """A unigram model with its scores rounded to multiples of 1/256.

    Segmentations are compared by sums of scores: SentencePiece adds them in single precision, Hugging Face's
    `tokenizers` in double. Sums of such multiples are exact in both (within a line of some thousand pieces), so that
    both find the same segmentation where two are nearly or exactly as good.
    """
    model = ModelProto.FromString(model_proto)
    for piece in model.pieces:
        if piece.type == piece.NORMAL:
            piece.score = round(piece.score * 256) / 256
    return model.SerializeToString()


def num_required_characters(frequencies: Counter[str], coverage: float) -> int:
    """How many characters get pieces of their own: the most frequent ones, until they cover the share `coverage` of
    the text. SentencePiece's rule, in its arithmetic (`LoadSentences`, single precision)."""
    total = sum(frequencies.values())
    covered = required = 0
    for _, count in frequencies.most_common():
        if np.float32(covered / total) >= np.float32(coverage):
            break
        covered += count
        required += 1
    return required


def _check(config: TrainTokenizerConfig) -> None:
    if config.vocab_size is not None and config.vocab_size <= special.NUM_FIXED_PIECES:
        raise ValueError(
            f"vocab_size={config.vocab_size} must be above {special.NUM_FIXED_PIECES}: {special.NUM_BYTES} bytes, "
            f"{special.NUM_FIXED_PIECES - special.NUM_BYTES} special tokens, and the characters of the text"
        )
    if config.vocab_size is not None and config.vocab_size >= 1 << 31:
        raise ValueError(f"vocab_size={config.vocab_size} must be below 2^31")
    if not 0.98 <= config.character_coverage <= 1:
        raise ValueError(f"character_coverage={config.character_coverage} must be between 0.98 and 1")
    if config.num_threads < 1:
        raise ValueError(f"num_threads={config.num_threads} must be at least 1")


def _options(config: TrainTokenizerConfig, vocab_size: int) -> dict[str, Any]:
    """SentencePiece's options, as they go to the trainer and into `tokenizer.meta.json`."""
    return {
        "model_type": config.kind.name,
        "vocab_size": vocab_size,
        "character_coverage": config.character_coverage,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "max_sentence_length": MAX_SENTENCE_LENGTH,
        "eos_id": special.END_OF_DOCUMENT_ID,
        "eos_piece": special.END_OF_DOCUMENT,
        "unk_id": special.UNKNOWN_ID,
        "unk_piece": special.UNKNOWN,
        "unk_surface": "",
        "bos_id": -1,
        "pad_id": -1,
        "control_symbols": [symbol for symbol in special.CONTROL_SYMBOLS if symbol != special.END_OF_DOCUMENT],
        "user_defined_symbols": list(special.USER_DEFINED_SYMBOLS),
        "num_threads": config.num_threads,
    }


def _count(source: _Source) -> _Counted:
    text = _Counted()
    for document in progress(source.documents(text.read), unit="documents", description="counting characters"):
        text.documents += 1
        text.bytes += len(document.text.encode())
        text.characters += len(document.text)
        text.frequencies.update("".join(piece for piece, is_seen in training_pieces(document.text) if is_seen))
    if not text.frequencies:
        config = source.config
        raise ValueError(f"inputs={', '.join(config.inputs)} hold no text to learn from, max_bytes={config.max_bytes}")
    return text


def _sentences(source: _Source, num_bytes: int) -> Iterator[str]:
    """The trainer's input."""
    bar: Progress[None]
    with progress(total=num_bytes, unit="B", description="feeding the trainer") as bar:
        for document in source.documents(ReadCounts()):
            for piece, is_seen in training_pieces(document.text):
                if is_seen:
                    yield piece
            bar.update(len(document.text.encode()))


def _run_trainer(options: dict[str, Any], sentences: Iterator[str]) -> bytes:
    """A trained model. SentencePiece's errors become ours; its log stays silent."""
    model = io.BytesIO()
    failure: list[BaseException] = []

    def guarded() -> Iterator[str]:
        try:
            yield from sentences
        except Exception as error:  # SentencePiece would pass on its text alone
            failure.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=guarded(), model_writer=model, minloglevel=LOG_ERRORS_ONLY, **options
        )
    except (RuntimeError, OSError) as error:
        if failure:
            raise failure[0] from None
        too_high = re.search(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)", str(error))
        if too_high:
            raise _VocabularyTooLarge(int(too_high[1])) from error
        raise ValueError(f"SentencePiece cannot train with vocab_size={options['vocab_size']}: {error}") from error
    return model.getvalue()


def _write(source: _Source, model_proto: bytes, options: dict[str, Any], text: _Counted) -> Tokenizer:
    out = Path(source.config.out)
    meta = {
        "version": FORMAT_VERSION,
        "fingerprint": fingerprint(model_proto),
        "kind": source.config.kind.name,
        "vocab_size": options["vocab_size"],
        "options": options,
        "sentencepiece_version": sentencepiece.__version__,
        "trained_on": {
            "inputs": source.files,
            "max_bytes": source.config.max_bytes,
            "documents": text.documents,
            "bytes": text.bytes,
            "characters": text.characters,
            "distinct_characters": len(text.frequencies),
            "empty": text.read.empty,
            "skipped": text.read.skipped,
            "replaced_u2581": text.read.replaced_u2581,
        },
    }
    tokenizer = Tokenizer(model_proto, out, meta)
    meta["special_tokens"] = {
        symbol: tokenizer.special_id(symbol) for symbol in (*special.CONTROL_SYMBOLS, *special.USER_DEFINED_SYMBOLS)
    }
    meta["figures"] = _figures(source, tokenizer, text.bytes)
    # The old meta goes first: a folder with a new model and an old meta is never seen as a tokenizer.
    (out / META_FILE).unlink(missing_ok=True)
    with atomic_write(out / MODEL_FILE) as file:
        file.write(model_proto)
    with atomic_write(out / META_FILE) as file:
        file.write(json.dumps(meta, ensure_ascii=False, indent=2).encode())
    log.info(
        "%s: %s pieces, %.2f bytes per token", out, f"{tokenizer.vocab_size:,}", meta["figures"]["bytes_per_token"]
    )
    return tokenizer


def _figures(source: _Source, tokenizer: Tokenizer, num_bytes: int) -> dict[str, Any]:
    """What the tokenizer does with an even share of its own training text."""
    sample = thin(source.documents(ReadCounts()), total_bytes=num_bytes, max_bytes=MEASURED_BYTES)
    is_byte = np.array([tokenizer.is_byte(index) for index in range(tokenizer.vocab_size)])
    used = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    measured_bytes = characters = 0
    for document in sample:
        measured_bytes += len(document.text.encode())
        characters += len(document.text)
        used += np.bincount(tokenizer.encode(document.text), minlength=tokenizer.vocab_size)
    tokens = int(used.sum())
    return {
        "measured_bytes": measured_bytes,
        "tokens": tokens,
        "bytes_per_token": measured_bytes / tokens,
        "characters_per_token": characters / tokens,
        "byte_token_ratio": float(used[is_byte].sum() / tokens),
        "used_pieces": int((used > 0).sum()),
    }
