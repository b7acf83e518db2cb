"""`megakor pretrain`: train a model from scratch. Every rank runs this under the `deepspeed` launcher."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from megakor.checkpoint.reader import CheckpointValues
from megakor.config.compose import main
from megakor.config.schema import PretrainConfig
from megakor.data.stream import HeldoutSet, PretrainStream
from megakor.tokenizer.tokenizer import Tokenizer
from megakor.train.engine import Engine
from megakor.train.loop import Training, train
from megakor.train.run import check_continues, process_group, resolve_vocabulary, resume_point, write_run
from megakor.train.values import SeededValues, Values


def run(config: PretrainConfig) -> None:
    """Train to `train.num_steps`, from the newest whole checkpoint of the run folder or from the seed."""
    with process_group(config) as dims:
        tokenizer = Tokenizer.load(config.data.tokenizer)
        size = config.train
        stream = PretrainStream(
            config.data.train,
            seed=size.seed,
            sequence_length=size.sequence_length,
            global_batch_size=size.global_batch_size,
        )
        heldout = [HeldoutSet(name, folder, size.sequence_length) for name, folder in config.data.validation.items()]
        for tokens in (stream.tokens, *(held_out.tokens for held_out in heldout)):
            tokens.manifest.check_tokenizer(tokenizer.fingerprint, f"data.tokenizer={config.data.tokenizer}")
        model = resolve_vocabulary(config.model, tokenizer.vocab_size)
        checkpoint = resume_point(config)
        with ExitStack() as stack:
            values: Values = SeededValues(model, size.seed)
            first_step = 0
            if checkpoint is not None:
                values = saved = stack.enter_context(CheckpointValues(checkpoint))
                check_continues(saved.manifest, config, model, tokenizer.fingerprint, stream.state())
                first_step = saved.manifest.step
            write_run(config, tokenizer)
            engine = Engine(config, model, tokenizer.vocab_size, dims, values)
        train(Training(config, Path(config.run), engine, stream, heldout, tokenizer.fingerprint, first_step))


if __name__ == "__main__":
    main("pretrain", run)
