"""Instruction pairs from files: Alpaca's `instruction,input,output`, or question and answer.

.jsonl, .jsonl.gz and .csv rows come in, `Pair`s go out. Column names are read without regard to case.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megakor.config.schema import OnError, PairsConfig
from megakor.corpus.reader import expand, sample_pairs_file
from megakor.logs import get_logger

log = get_logger(__name__)

COLUMNS = {
    "question": ("instruction", "question", "q"),
    "context": ("input", "context"),
    "answer": ("output", "answer", "a", "response"),
}
"""Names under which each part of a pair is found."""


@dataclass(frozen=True)
class Pair:
    """A question, the context it refers to (may be empty) and the answer."""

    question: str
    context: str
    answer: str


def parse(row: dict[str, Any]) -> Pair:
    """A row as a pair.

    Raises:
        ValueError: a part is missing, empty or not text.
    """
    lowered = {str(key).strip().lower(): value for key, value in row.items() if key is not None}
    parts = {}
    for part, names in COLUMNS.items():
        value = next((lowered[name] for name in names if name in lowered), "" if part == "context" else None)
        value = "" if value is None and part == "context" else value
        if not isinstance(value, str) or not (value.strip() or part == "context"):
            raise ValueError(f"{'/'.join(names)}={value!r} must be a text that is not empty")
        parts[part] = value.strip()
    return Pair(**parts)


def rows(path: str) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """The rows of a file with their line numbers; a broken line comes as its error."""
    name = path.lower()
    if name.endswith(".csv"):
        with Path(path).open(encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text)
            try:
                for row in reader:
                    yield reader.line_num, dict(row)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: after line {reader.line_num}: not UTF-8 ({error.reason})") from None
        return
    if not name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"pairs.files: {path} must end in .jsonl, .jsonl.gz or .csv")
    with gzip.open(path, "rb") if name.endswith(".gz") else Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise ValueError("must be a JSON object")
                yield number, row
            except UnicodeDecodeError as error:
                yield number, ValueError(f"not UTF-8 ({error.reason})")
            except ValueError as error:
                yield number, ValueError(f"broken JSON ({error})")


def pair_files(config: PairsConfig) -> list[str]:
    """The configured files, or the sample's own."""
    return expand(config.files) if config.files else [sample_pairs_file()]


def read_pairs(config: PairsConfig) -> list[Pair]:
    """Every pair of the configured files, duplicates dropped, in file order.

    Raises:
        ValueError: a row is unusable and `pairs.on_error=stop`, or nothing is left.
    """
    paths = pair_files(config)
    found: dict[Pair, None] = {}
    skipped = 0
    for path in paths:
        for number, row in rows(path):
            try:
                if isinstance(row, ValueError):
                    raise row
                found[parse(row)] = None
            except ValueError as error:
                if config.on_error is OnError.stop:
                    raise ValueError(f"{path}: line {number}: {error}; pairs.on_error=skip passes over it") from None
                skipped += 1
        if config.max_pairs and len(found) >= config.max_pairs:
            break
    if not found:
        raise ValueError(f"pairs.files={config.files or paths} must hold at least one pair")
    pairs = list(found)[: config.max_pairs]
    log.info("%d pairs from %d files, %d rows skipped", len(pairs), len(paths), skipped)
    return pairs


def split(pairs: Sequence[Pair], validation_ratio: float) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs; a pair's side depends on a hash of its question and context alone."""

    def position(pair: Pair) -> float:
        digest = hashlib.sha256(f"{pair.question}\0{pair.context}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    held_out = [pair for pair in pairs if position(pair) < validation_ratio]
    if validation_ratio and not held_out and len(pairs) > 1:
        held_out = [min(pairs, key=position)]
    kept = [pair for pair in pairs if pair not in set(held_out)]
    if not kept:
        raise ValueError(f"pairs.validation_ratio={validation_ratio} must leave pairs to train on, of {len(pairs)}")
    return kept, held_out
