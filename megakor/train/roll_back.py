"""Back to before a loss spike: an earlier checkpoint, and a stream without the samples that led to the spike.

PaLM's remedy (Chowdhery et al. 2022, section 5.1): going back alone repeats the spike, other data do not, and the same
data later on do no harm.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from megakor.checkpoint.format import LATEST, committed, step_of
from megakor.checkpoint.keep import discard
from megakor.checkpoint.reader import CheckpointValues
from megakor.data.ledger import passages
from megakor.data.skips import Skip, add_skip, stretches
from megakor.data.stream import PretrainStream
from megakor.files import atomic_write
from megakor.logs import get_logger
from megakor.parallel.together import on_first_rank
from megakor.train.engine import Engine
from megakor.train.run import shared_check
from megakor.train.spikes import Spike

log = get_logger(__name__)

FOLDER = "skipped"


def roll_back(
    run: Path, engine: Engine, stream: PretrainStream, spike: Spike, num_before: int
) -> tuple[int, PretrainStream] | None:
    """Go back to the newest whole checkpoint before a spike, and leave its samples out; every rank calls.

    Later checkpoints are removed: they are of steps that the run will not have taken. The documents that are left out
    are written to `skipped/step-….jsonl` of the run folder.

    Args:
        num_before: steps before the spike's whose samples are left out, too.

    Returns:
        The step to go on from and the stream from there on; None when there is no checkpoint that early.
    """
    first = max(1, spike.step - num_before)  # the first step whose samples go; the checkpoint must be before it
    earlier = on_first_rank(lambda: [folder for folder in committed(run) if step_of(folder) < first][::-1])
    target = next((folder for folder in earlier if shared_check(folder) is None), None)
    if target is None:
        return None
    left_out = [
        stretch for step in range(first, spike.step + 1) for stretch in stretches(stream.rows(step - 1).positions)
    ]
    skip = Skip(spike.step, step_of(target), left_out, str(spike))

    def write_down() -> None:
        """In this order: were it cut off, the run would meet the spike again, and go back again."""
        with atomic_write(run / FOLDER / f"step-{spike.step:08d}.jsonl") as file:
            for step in range(first, spike.step + 1):
                for passage in passages(stream, step):
                    file.write((json.dumps(asdict(passage), ensure_ascii=False) + "\n").encode())
        with atomic_write(target.parent / LATEST) as file:
            file.write(target.name.encode())
        for folder in committed(run):
            if step_of(folder) > step_of(target):
                discard(folder)
        add_skip(run, skip)

    on_first_rank(write_down)
    vocab_size = engine.model.vocab_size
    with CheckpointValues(target, vocab_size=vocab_size) as values:
        engine.restore(values)
    dist.barrier()  # nobody saves before all have read
    log.warning(
        "%s: gone back to step %d; the samples %s are left out from here on, and their documents named in %s",
        spike, step_of(target), left_out, run / FOLDER,
    )  # fmt: skip
    return step_of(target), stream.skipping(left_out)
