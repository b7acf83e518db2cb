"""`megakor pretrain`: train a model from scratch. Every rank runs this under the `deepspeed` launcher."""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # a third of the imports' time goes to it, for nothing; `main` turns it on

from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from megakor.checkpoint.reader import CheckpointValues
from megakor.config.compose import main
from megakor.config.schema import PretrainConfig
from megakor.data.changes import keep_tables
from megakor.data.heldout import HeldoutSet
from megakor.data.hub import DatasetStream, dataset_stream
from megakor.data.manifest import check_files
from megakor.data.stream import PretrainStream, prefetcher, pretrain_stream
from megakor.model.specs import resolve_vocabulary
from megakor.parallel.together import on_first_rank
from megakor.preflight.flight import preflight
from megakor.tokenizer.tokenizer import Tokenizer
from megakor.train.device import local_world_size
from megakor.train.engine import Engine
from megakor.train.loop import train
from megakor.train.run import (
    bring_back,
    check_continues,
    check_same_everywhere,
    locked,
    process_group,
    resume_point,
    write_run,
)
from megakor.train.training import Training
from megakor.train.values import SeededValues, Values


def run(config: PretrainConfig) -> None:
    """Train to `train.num_steps`, from the newest whole checkpoint of the run folder or from the seed."""
    check_machines = preflight(config)
    with process_group(config) as dims:
        check_machines()
        there = bring_back(config)
        tokenizer = Tokenizer.load(config.data.tokenizer)
        run, size = Path(config.run), config.train
        stream: PretrainStream | DatasetStream
        if config.data.dataset:
            stream = dataset_stream(config.data, size, tokenizer)
        else:
            stream = pretrain_stream(config.data, size, tokenizer, run, local_world_size())
        files = stream.files or prefetcher(config.data, local_world_size())
        heldout = [
            HeldoutSet(name, folder, size.sequence_length, files, config.data.separate_documents)
            for name, folder in config.data.validation.items()
        ]
        for source in (*stream.sources.values(), *(held_out.tokens for held_out in heldout)):
            source.manifest.check_tokenizer(tokenizer.fingerprint, f"data.tokenizer={config.data.tokenizer}")
            if not source.foreign:
                on_first_rank(partial(check_files, source.folder, source.manifest))
        check_same_everywhere(stream.state(0))  # a folder of a node's own may hold other shards
        model = resolve_vocabulary(config.model, tokenizer.vocab_size)
        with ExitStack() as stack:
            stack.enter_context(locked(run))
            checkpoint = resume_point(config, there)
            values: Values = SeededValues(model, size.seed)
            first_step = 0
            with ExitStack() as reading:
                if checkpoint is not None:
                    values = saved = reading.enter_context(CheckpointValues(checkpoint, vocab_size=model.vocab_size))
                    first_step = saved.manifest.step
                    check_continues(saved.manifest, config, model, tokenizer.fingerprint, stream.state(first_step))
                write_run(config, tokenizer)
                on_first_rank(partial(keep_tables, run, stream.sources))
                engine = Engine(config, model, tokenizer.vocab_size, dims, values)
            stack.enter_context(closing(stream))
            if files is not None:
                stack.enter_context(closing(files))
            train(Training(config, run, engine, stream, heldout, tokenizer.fingerprint, first_step))


if __name__ == "__main__":
    main("pretrain", run)
