"""`megakor instruct`: go on from a checkpoint with instruction pairs. Every rank runs this under the launcher."""

from __future__ import annotations

from contextlib import ExitStack

import torch.distributed as dist

from megakor.checkpoint.reader import CheckpointValues, model_config, resolve
from megakor.config.checks import check_fit
from megakor.config.compose import main
from megakor.config.schema import InstructConfig
from megakor.instruct.pairs import read_pairs, split
from megakor.instruct.stream import HeldoutPairs, PairStream, tokenise
from megakor.instruct.template import FILE, chat_template
from megakor.tokenizer.tokenizer import Tokenizer
from megakor.train.engine import Engine
from megakor.train.loop import Training, train
from megakor.train.run import check_continues, check_tokenizer, open_run, process_group, resume_point


def run(config: InstructConfig) -> None:
    """Train to `train.num_steps`, from the run folder's own newest checkpoint or from the base's weights."""
    with process_group(config) as dims, ExitStack() as stack:
        values = stack.enter_context(CheckpointValues(resolve(config.base), with_optimizer=False))
        model = model_config(values.manifest)
        check_fit(config, model)
        tokenizer = Tokenizer.load(config.tokenizer)
        check_tokenizer(values.manifest, tokenizer)
        size = config.train
        kept, held_out = split(read_pairs(config.pairs), config.pairs.validation_ratio)
        stream = PairStream(
            tokenise(kept, tokenizer, size.sequence_length),
            tokenizer.eod_id,
            seed=size.seed,
            sequence_length=size.sequence_length,
            global_batch_size=size.global_batch_size,
        )
        examples = tokenise(held_out, tokenizer, size.sequence_length)
        heldout = [HeldoutPairs("pairs", examples, tokenizer.eod_id, size.sequence_length)] if examples else []
        folder = open_run(config, tokenizer)
        if dist.get_rank() == 0:
            (folder / "tokenizer" / FILE).write_text(chat_template(), encoding="utf-8")
        checkpoint = resume_point(folder)
        first_step = 0
        if checkpoint is not None:
            values = stack.enter_context(CheckpointValues(checkpoint))
            check_continues(values.manifest, config, model, tokenizer.fingerprint, stream.state())
            first_step = values.manifest.step
        engine = Engine(config, model, tokenizer.vocab_size, dims, values)
        train(Training(config, folder, engine, stream, heldout, tokenizer.fingerprint, first_step))


if __name__ == "__main__":
    main("instruct", run)
