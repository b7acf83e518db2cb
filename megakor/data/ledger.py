"""The ledger of a run: which documents made a step's batch, and which steps saw a document.

Nothing is logged for it. The stream is a pure function with an inverse, so both follow from the run's configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megakor.data.source import Source
from megakor.data.stream import PretrainStream

NEAR = 16  # shards whose tables are kept at a time


@dataclass(frozen=True)
class Passage:
    """A stretch of a document that a step saw.

    Attributes:
        step: number of the step as it is logged, from 1.
        row: of the global batch, from 0.
        source: name of the source; empty for a run's only one.
        shard: prefix of its files.
        number: of the document in its shard.
        document: its id; None in shards of other makers.
        origin: where the document is from, as its text's reader said.
        start: first token, within the document.
        stop: the one after the last; labels count as seen.
    """

    step: int
    row: int
    source: str
    shard: str
    number: int
    document: str | None
    origin: str | None
    start: int
    stop: int


def passages(stream: PretrainStream, step: int) -> list[Passage]:
    """What made the batch of a step, numbered from 1, row by row."""
    rows, length, names = stream.rows(step - 1), stream.plan.sequence_length, list(stream.sources)
    found: list[Passage] = []
    # Rows come by stream, so those of a shard are near each other: its tables are read once.
    starts_of = lru_cache(NEAR)(lambda name, shard: stream.sources[name].document_starts(shard))
    origins_of = lru_cache(NEAR)(lambda name, shard: stream.sources[name].origins(shard))
    for row, (source, shard, sample) in enumerate(zip(rows.sources, rows.shards, rows.samples, strict=True)):
        name = names[source]
        held = stream.sources[name]
        first = int(sample) * length
        last = first + int(held.num_labels(np.array([shard]), np.array([sample]), length)[0])  # of its tokens
        starts, origins = starts_of(name, int(shard)), origins_of(name, int(shard))
        # Empty documents hold no token of it.
        begin, end = (int(np.searchsorted(starts, token, side="right")) - 1 for token in (first, last))
        for number in range(begin, end + 1):
            start, stop = max(first, int(starts[number])), min(last + 1, int(starts[number + 1]))
            if start < stop:
                origin = origins.slice(number, 1).to_pylist()[0] if origins is not None else {}
                found.append(
                    Passage(
                        step, row, name, held.manifest.shards[int(shard)].prefix, number, origin.get("id"),
                        origin.get("source"), start - int(starts[number]), stop - int(starts[number]),
                    )
                )  # fmt: skip
    return found


def find(source: Source, document: str, shards: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Shard and number of each document with this id, looked for in these shards."""
    for shard in shards:
        origins = source.origins(shard)
        if origins is not None:
            for number in np.flatnonzero(np.asarray(origins["id"]) == document):
                yield shard, int(number)


def steps(stream: PretrainStream, name: str, shard: int, number: int, num_steps: int) -> list[int]:
    """The steps up to `num_steps` that saw a document, from 1, ascending."""
    index, source, length = list(stream.sources).index(name), stream.sources[name], stream.plan.sequence_length
    starts = source.document_starts(shard)
    first, stop = int(starts[number]), int(starts[number + 1])
    num_samples = int(source.samples_of_shards(length)[shard])
    # A document's first token may be the label after a sample's inputs.
    samples = np.arange(max(0, first - 1) // length, min(num_samples, (stop - 1) // length + 1))
    found: set[int] = set()
    for epoch in range(_num_epochs(stream, index, num_steps)):
        places = stream.orders[index].positions(np.full_like(samples, epoch), np.full_like(samples, shard), samples)
        positions = stream.mixture.positions(index, places)
        taken = stream.plan.samples(positions[positions >= 0])
        found |= {stream.plan.step_of(int(sample)) + 1 for sample in taken[taken >= 0]}
    return sorted(step for step in found if step <= num_steps)


def _num_epochs(stream: PretrainStream, index: int, num_steps: int) -> int:
    """How often a source is begun within so many steps."""
    drawn = stream.mixture.drawn(stream.plan.end_of(num_steps))[index]
    return -(-drawn // stream.orders[index].num_samples)
