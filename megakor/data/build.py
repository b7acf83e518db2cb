"""Text becomes shards: one reader, several tokenising processes, one writer, the same bytes for any number of them.

    read_documents ─► chunks ─► tokenise (processes) ─► shard-00000.{bin,idx,documents.parquet,json} … ─► manifest.json

Results are taken in the reader's order, so the documents of a shard depend on the text, the tokenizer and `shard_size`
alone. A shard is closed at the first document that brings it to `shard_size` tokens, and `shard-NNNNN.json`, its
record, is written after its files. A run that died is started again by the same command: shards with a record are
kept, their documents are read again and compared by hash, and the work goes on at the first missing one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from megakor.config.schema import ShardConfig
from megakor.corpus.reader import Document, ReadCounts, read_documents
from megakor.corpus.text import normalize
from megakor.data.indexed import dtype_for
from megakor.data.manifest import (
    MANIFEST_NAME,
    TABLE_NAME,
    Manifest,
    check_shard,
    load_manifest,
    write_manifest,
)
from megakor.data.remote import RemoteFolder
from megakor.data.shard_writer import OpenShard, Origin, TokenisedChunk, record_path
from megakor.data.shards import ShardEntry, Shards, shard_entry
from megakor.logs import Progress, get_logger, progress

CHUNK_CHARACTERS = 1 << 17  # text sent to a process at a time: large enough to hide its cost, small enough to share out
CHUNK_DOCUMENTS = 1024
CHUNKS_PER_WORKER = 4  # chunks on their way; with the sizes above this bounds the memory

logger = get_logger(__name__)


class TokenizerLike(Protocol):
    """What a tokenizer must offer here; it is pickled into the processes."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod_id(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]: ...


def build_shards(config: ShardConfig, tokenizer: TokenizerLike) -> Manifest:
    """Tokenise `config.inputs` into shards under `config.out`, or finish what an earlier run began there.

    ValueError when `out` holds shards of another tokenizer, shard size or text; nothing there is touched then.
    """
    for name in ("shard_size", "num_workers"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    dtype = dtype_for(tokenizer.vocab_size)
    if dtype.itemsize > 2:
        logger.info("vocab_size=%d is past 65,536: tokens are written as %s", tokenizer.vocab_size, dtype)
    empty = Manifest(
        tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id, dtype.name, config.shard_size, Shards.of([])
    )
    out = Path(config.out)
    finished = _finished_shards(out, empty)
    damaged = record_path(out, len(finished)).exists()
    built = (out / MANIFEST_NAME).is_file() and not damaged

    counts = ReadCounts()
    documents = read_documents(
        config.inputs, text_key=config.text_key, id_key=config.id_key, on_error=config.on_error, counts=counts
    )
    documents = _skip(documents, finished, out)
    following = next(documents, None)
    if following is None and finished and built:
        logger.info("%s: already built, %d shards are as these inputs make them", out, len(finished))
        return load_manifest(RemoteFolder(str(out)))
    if following is not None and finished and (built or finished[-1].num_tokens < config.shard_size):
        raise ValueError(f"out={out} holds the shards of other inputs, which end earlier; remove it or name another")

    out.mkdir(parents=True, exist_ok=True)
    for name in (MANIFEST_NAME, TABLE_NAME):  # not whole until a damaged shard is made again
        (out / name).unlink(missing_ok=True)
    if finished:
        logger.info("%s: %d finished shards are kept", out, len(finished))
    shards = list(finished)
    if following is not None:
        shards += _write_shards(itertools.chain([following], documents), config, tokenizer, empty, len(finished))
    manifest = replace(empty, shards=Shards.of(shards))
    write_manifest(out, manifest)
    logger.info(
        "%s: %d shards, %d documents, %d tokens from %d bytes of text; left out: %d empty documents, %d bad records; "
        "%d characters U+2581 replaced",
        out,
        len(shards),
        manifest.num_documents,
        manifest.num_tokens,
        manifest.num_text_bytes,
        counts.empty,
        counts.skipped,
        manifest.shards.total("num_replaced"),
    )
    return manifest


# ------------------------------------------------------------------------------------------------- what is there


def _finished_shards(out: Path, empty: Manifest) -> list[ShardEntry]:
    """The entries of the shards that are whole, from the first up to the first that is not."""
    finished: list[ShardEntry] = []
    sizes = RemoteFolder(str(out)).sizes() if out.is_dir() and any(out.iterdir()) else {}
    while (path := record_path(out, len(finished))).is_file():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            job, entry = record["job"], shard_entry(record["shard"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: is no record of a shard: {error!r}") from error
        for name, value in empty.job().items():
            if job.get(name) != value:
                raise ValueError(
                    f"out={out} holds shards with {name}={job.get(name)}, must be {value} to go on; "
                    "remove it or name another"
                )
        try:
            check_shard(str(out), entry, sizes)
        except ValueError as error:
            logger.warning("%s; it is made again", error)
            break
        finished.append(entry)
    if not finished and (out / MANIFEST_NAME).exists() and not record_path(out, 0).exists():
        raise ValueError(f"out={out} holds a {MANIFEST_NAME} of other origin; name another folder")
    return finished


def _skip(documents: Iterator[Document], finished: list[ShardEntry], out: Path) -> Iterator[Document]:
    """Read past the documents of the finished shards, making sure that they are the same."""
    for entry in finished:
        digest = hashlib.sha256()
        for document in itertools.islice(documents, entry.num_documents):
            digest.update(hashlib.sha256(document.text.encode()).digest())
        if digest.hexdigest() != entry.text_sha256:
            raise ValueError(f"out={out}: {entry.prefix} was made from other inputs; remove {out} or name another")
    return documents


# ------------------------------------------------------------------------------------------------- the work


def _write_shards(
    documents: Iterable[Document], config: ShardConfig, tokenizer: TokenizerLike, empty: Manifest, first: int
) -> list[ShardEntry]:
    """Tokenise in processes, write shards `first` and up; their entries. Holds one open shard and a few chunks."""
    entries: list[ShardEntry] = []
    shard: OpenShard | None = None
    tokenised = _tokenise(documents, tokenizer, empty.dtype, config.num_workers)
    try:
        bar: Progress[None]
        with progress(unit="tokens", description="shard") as bar:
            for origins, chunk in tokenised:
                start = 0
                for document, origin in enumerate(origins):
                    shard = shard or OpenShard(Path(config.out), first + len(entries), empty)
                    end = start + chunk.lengths[document]
                    shard.add(chunk, document, chunk.tokens[start:end], origin)
                    if shard.writer.num_tokens >= config.shard_size:
                        entries.append(shard.close())
                        shard = None
                    start = end
                bar.update(len(chunk.tokens))
        if shard is not None:
            entries.append(shard.close())
            shard = None
    finally:
        tokenised.close()
        if shard is not None:
            shard.writer.abort()
    return entries


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= CHUNK_CHARACTERS or len(chunk) >= CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _tokenise(
    documents: Iterable[Document], tokenizer: TokenizerLike, dtype: str, num_workers: int
) -> Generator[tuple[list[Origin], TokenisedChunk], None, None]:
    """Where each chunk's documents are from, and their tokens, in the reader's order.

    A bounded number of chunks is on its way.
    """
    spawn = multiprocessing.get_context("spawn")  # fork would copy the threads' locks of whoever calls
    pool = ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_start_worker, initargs=(tokenizer, dtype))
    pending: deque[tuple[list[Origin], Future[TokenisedChunk]]] = deque()
    try:
        for chunk in _chunks(documents):
            origins = [Origin(document.id, document.source) for document in chunk]
            pending.append((origins, pool.submit(_tokenise_chunk, [document.text for document in chunk])))
            if len(pending) >= CHUNKS_PER_WORKER * num_workers:
                origins, future = pending.popleft()
                yield origins, future.result()
        while pending:
            origins, future = pending.popleft()
            yield origins, future.result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"num_workers={num_workers}: a tokenising process died (out of memory?); "
            "finished shards are kept, the same command goes on from them"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ------------------------------------------------------------------------------------------------- in the processes

# The tokenizer of this process and the tokens' type. A pool's initializer has nowhere else to leave them.
_worker: tuple[TokenizerLike, np.dtype] | None = None


def _start_worker(tokenizer: TokenizerLike, dtype: str) -> None:
    global _worker
    _worker = (tokenizer, np.dtype(dtype))
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A pool's processes wait for ever when the one that started them was killed; these do not."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tokenise_chunk(texts: list[str]) -> TokenisedChunk:
    assert _worker is not None
    tokenizer, dtype = _worker
    ids: list[int] = []
    lengths, num_bytes, num_replaced, digests = [], [], [], []
    for text in texts:
        normal, replaced = normalize(text)
        before = len(ids)
        ids.extend(tokenizer.encode(normal))
        ids.append(tokenizer.eod_id)
        lengths.append(len(ids) - before)
        num_bytes.append(len(normal.encode()))
        num_replaced.append(replaced)
        digests.append(hashlib.sha256(text.encode()).digest())
    wide = np.array(ids, dtype=np.int64)
    if wide.min() < 0 or wide.max() >= tokenizer.vocab_size:
        raise ValueError(
            f"ids {wide.min()} … {wide.max()} must be below the tokenizer's vocab_size={tokenizer.vocab_size}"
        )
    return TokenisedChunk(wide.astype(dtype), lengths, num_bytes, num_replaced, digests)
