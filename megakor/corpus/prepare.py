"""`megakor corpus`: raw text in; one corpus of normal-form documents with a held-out split out.

    read ─► normalize ─► thin (max_bytes) ─► split by a hash of the text ─► train.jsonl, heldout.jsonl, corpus.json

A text's side depends on its hash alone, so equal texts never stand on both sides, and adding files moves no document.
`corpus.json` holds the figures and is written last: where it is, the corpus is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from megakor.config.schema import CorpusConfig
from megakor.corpus.reader import Document, ReadCounts, expand, read_documents, sample_files
from megakor.corpus.text import normalize
from megakor.corpus.thin import cut, thin
from megakor.files import atomic_write
from megakor.logs import get_logger, progress

FORMAT_VERSION = 1
MAX_SOURCES = 1000  # named in corpus.json; the documents of further sources are counted together
OTHER_SOURCES = "(other)"

log = get_logger(__name__)


@dataclass
class Figures:
    documents: int = 0
    bytes: int = 0
    characters: int = 0

    def add(self, document: Document) -> None:
        self.documents += 1
        self.bytes += len(document.text.encode())
        self.characters += len(document.text)


@dataclass
class _Outcome:
    """What one pass over the documents wrote."""

    train: Figures = field(default_factory=Figures)
    heldout: Figures = field(default_factory=Figures)
    sources: dict[str, Figures] = field(default_factory=dict)
    lowest_hash: int = 1 << 64
    highest_hash: int = -1

    @property
    def documents(self) -> int:
        return self.train.documents + self.heldout.documents


def prepare(config: CorpusConfig) -> dict[str, Any]:
    """Write `out/{train,heldout}.jsonl` (id, text, source) and `out/corpus.json`; returns what the latter holds.

    At least one document stands on each side. Of a corpus with a single document, its end is held out.
    """
    if not 0 < config.heldout_ratio < 1:
        raise ValueError(f"heldout_ratio={config.heldout_ratio} must be above 0 and below 1")
    if config.max_bytes is not None and config.max_bytes < 1:
        raise ValueError(f"max_bytes={config.max_bytes} must be at least 1, or null for all")
    files = expand(config.inputs or sample_files())
    out = Path(config.out)
    for file in files:
        if "://" not in file and Path(file).resolve().parent == out.resolve():
            raise ValueError(f"out={config.out} must not be the folder of an input ({file})")

    available = Figures()
    if config.max_bytes is not None:
        for document in progress(_documents(config, files, ReadCounts()), unit="documents", description="measuring"):
            available.add(document)

    counts = ReadCounts()

    def documents() -> Iterator[Document]:
        nonlocal counts
        counts = ReadCounts()
        yield from thin(_documents(config, files, counts), total_bytes=available.bytes, max_bytes=config.max_bytes)

    limit = int(config.heldout_ratio * (1 << 64))
    outcome = _write(out, _by_hash(documents(), limit), config.max_bytes)
    if outcome.documents == 1:
        outcome = _write(out, _ends_held_out(documents(), config.heldout_ratio), config.max_bytes)
    elif outcome.lowest_hash == outcome.highest_hash:
        raise ValueError(
            f"inputs={', '.join(files)} hold one text only, {outcome.documents} times: nothing to hold out"
        )
    elif outcome.heldout.documents == 0:
        outcome = _write(out, _by_hash(documents(), outcome.lowest_hash + 1), config.max_bytes)
    elif outcome.train.documents == 0:
        outcome = _write(out, _by_hash(documents(), outcome.highest_hash), config.max_bytes)

    figures = _report(config, files, counts, outcome, available)
    with atomic_write(out / "corpus.json") as report:
        report.write(json.dumps(figures, ensure_ascii=False, indent=2).encode())
    log.info(
        "%s: %s documents to train on (%s bytes), %s held out (%s bytes), %s skipped",
        out,
        *(f"{figures['splits'][side][key]:,}" for side in ("train", "heldout") for key in ("documents", "bytes")),
        counts.skipped,
    )
    return figures


def text_hash(text: str) -> int:
    """The first 64 bits of the text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _documents(config: CorpusConfig, files: list[str], counts: ReadCounts) -> Iterator[Document]:
    """The documents of `files` in normal form."""
    reading = read_documents(
        files, text_key=config.text_key, id_key=config.id_key, on_error=config.on_error, counts=counts
    )
    for document in reading:
        text, replaced = normalize(document.text)
        counts.replaced_u2581 += replaced
        yield replace(document, text=text)


def _by_hash(documents: Iterable[Document], limit: int) -> Iterator[tuple[Document, bool]]:
    """(document, is it held out): those whose hash is below `limit` are."""
    for document in documents:
        yield document, text_hash(document.text) < limit


def _ends_held_out(documents: Iterable[Document], ratio: float) -> Iterator[tuple[Document, bool]]:
    """Each document in two: its beginning to train on, and about `ratio` of it, its end, held out."""
    for document in documents:
        head = cut(document.text, int((1 - ratio) * len(document.text.encode())))
        tail = document.text[len(head) :]
        if not head.strip() or not tail.strip():
            raise ValueError(
                f"{document.source}: one document of {len(document.text)} characters cannot be split in two"
            )
        yield replace(document, id=f"{document.id}#train", text=head), False
        yield replace(document, id=f"{document.id}#heldout", text=tail), True


def _write(out: Path, documents: Iterable[tuple[Document, bool]], max_bytes: int | None) -> _Outcome:
    outcome = _Outcome()
    with atomic_write(out / "train.jsonl") as train, atomic_write(out / "heldout.jsonl") as heldout:
        for document, is_heldout in progress(documents, unit="documents", description="writing the corpus"):
            _write_line(heldout if is_heldout else train, document)
            (outcome.heldout if is_heldout else outcome.train).add(document)
            known = document.source in outcome.sources or len(outcome.sources) < MAX_SOURCES
            outcome.sources.setdefault(document.source if known else OTHER_SOURCES, Figures()).add(document)
            hash_ = text_hash(document.text)
            outcome.lowest_hash = min(outcome.lowest_hash, hash_)
            outcome.highest_hash = max(outcome.highest_hash, hash_)
        if outcome.documents == 0:
            raise ValueError(f"max_bytes={max_bytes} leaves no document")
        (out / "corpus.json").unlink(missing_ok=True)  # the old one ends with the files that it tells of
    return outcome


def _write_line(file: BinaryIO, document: Document) -> None:
    file.write(json.dumps(asdict(document), ensure_ascii=False).encode() + b"\n")


def _report(
    config: CorpusConfig, files: list[str], counts: ReadCounts, outcome: _Outcome, available: Figures
) -> dict[str, Any]:
    train, heldout = outcome.train, outcome.heldout
    return {
        "version": FORMAT_VERSION,
        "inputs": files,
        "heldout_ratio": config.heldout_ratio,
        "max_bytes": config.max_bytes,
        "available": asdict(available) if config.max_bytes is not None else None,
        "documents": outcome.documents,
        "bytes": train.bytes + heldout.bytes,
        "characters": train.characters + heldout.characters,
        "empty": counts.empty,
        "skipped": counts.skipped,
        "replaced_u2581": counts.replaced_u2581,
        "splits": {"train": asdict(train), "heldout": asdict(heldout)},
        "sources": {name: asdict(figures) for name, figures in sorted(outcome.sources.items())},
    }
