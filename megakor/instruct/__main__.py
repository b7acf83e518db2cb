"""`megakor instruct`: go on from a checkpoint with instruction pairs. Every rank runs this under the launcher."""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # a third of the imports' time goes to it, for nothing; `main` turns it on

from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from megakor.checkpoint.reader import CheckpointValues, model_config, open_weights, resolve, run_of
from megakor.config.checks import check_fit
from megakor.config.compose import main
from megakor.config.schema import InstructConfig
from megakor.data.plan import Plan
from megakor.files import atomic_write
from megakor.instruct.adapters import adapter_entry, check_adapters
from megakor.instruct.pairs import read_pairs, split
from megakor.instruct.stream import HeldoutPairs, PairStream, tokenise
from megakor.instruct.template import FILE, chat_template
from megakor.preflight.flight import preflight
from megakor.tokenizer.tokenizer import Tokenizer
from megakor.train.engine import Engine
from megakor.train.loop import train
from megakor.train.run import (
    bring_back,
    check_continues,
    check_tokenizer,
    locked,
    process_group,
    resume_point,
    write_run,
)
from megakor.train.training import Training
from megakor.train.values import AdaptedValues, SeededValues, Values


def run(config: InstructConfig) -> None:
    """Train to `train.num_steps`, from the run folder's own newest checkpoint or from the base's weights.

    With adapters the base's weights are read at every start: the run's checkpoints hold the adapters alone.
    """
    check_machines = preflight(config)
    with process_group(config) as dims, ExitStack() as stack:
        check_machines()
        base = resolve(config.base)
        if run_of(base).resolve() == Path(config.run).resolve():
            raise ValueError(f"run={config.run} must be another folder than base={config.base}")
        weights = stack.enter_context(open_weights(base))
        model, lora = model_config(weights.manifest), config.lora if config.lora.rank else None
        adapters = None if lora is None else adapter_entry(lora, base, weights.manifest.step)
        check_fit(config, model)
        tokenizer = Tokenizer.load(config.tokenizer)
        check_tokenizer(weights.manifest, tokenizer)
        size = config.train
        kept, held_out = split(read_pairs(config.pairs), config.pairs.validation_ratio)
        stream = PairStream(
            tokenise(kept, tokenizer, size.sequence_length),
            tokenizer.eod_id,
            seed=size.seed,
            plan=Plan(size.global_batch_size, size.sequence_length, size.batch_sizes),
            packing=config.pairs.packing,
        )
        examples = tokenise(held_out, tokenizer, size.sequence_length)
        shape = tokenizer.eod_id, size.sequence_length, config.pairs.packing
        heldout = [HeldoutPairs("pairs", examples, *shape)] if examples else []
        there = bring_back(config)
        stack.enter_context(locked(Path(config.run)))
        checkpoint = resume_point(config, there)
        values: Values = weights if lora is None else SeededValues(model, size.seed, lora)
        first_step = 0
        if checkpoint is not None:
            values = saved = stack.enter_context(CheckpointValues(checkpoint))
            first_step = saved.manifest.step
            check_continues(saved.manifest, config, model, tokenizer.fingerprint, stream.state(first_step))
            check_adapters(saved.manifest, config, adapters)
        if lora is not None:
            values = AdaptedValues(weights, values)
        write_run(config, tokenizer)
        folder = Path(config.run)
        if dist.get_rank() == 0:
            with atomic_write(folder / "tokenizer" / FILE) as file:
                file.write(chat_template().encode())
        engine = Engine(config, model, tokenizer.vocab_size, dims, values, lora)
        train(Training(config, folder, engine, stream, heldout, tokenizer.fingerprint, first_step, adapters))


if __name__ == "__main__":
    main("instruct", run)
