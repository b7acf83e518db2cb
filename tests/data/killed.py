"""A data rank as a process of its own, which a test kills."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megakor.data.stream import PretrainStream
from megakor.files import atomic_write
from tests.data.test_stream import made


def rows(stream: PretrainStream, step: int, dp_rank: int = 0, dp_size: int = 1, micro_batch_size: int = 1) -> bytes:
    """What a rank sees of a step, row by row: inputs, labels and mask of each."""
    return b"".join(
        values[row].tobytes()
        for batch in stream.micro_batches(step, dp_rank, dp_size, micro_batch_size)
        for row in range(micro_batch_size)
        if batch.loss_mask[row].any()
        for values in (batch.input_ids, batch.labels, batch.loss_mask)
    )


def run_rank(
    environment: dict[str, str], sources: dict[str, Any], keys: dict[str, Any], out: Path, start: int, dp_rank: int,
    dp_size: int, micro_batch_size: int,
) -> None:  # fmt: skip
    """Write what this rank sees of each step from `start` on, into `<step>-<dp_rank>`, until the run ends."""
    os.environ.update(environment)
    stream = made(sources, **keys)
    for step in range(start, keys["num_steps"]):
        with atomic_write(out / f"{step}-{dp_rank}") as file:
            file.write(rows(stream, step, dp_rank, dp_size, micro_batch_size))
    stream.close()
