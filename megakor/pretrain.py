"""`megakor pretrain`: train a model from scratch. Every rank runs this under the `deepspeed` launcher."""

from __future__ import annotations

from contextlib import ExitStack

from megakor.checkpoint.reader import CheckpointValues
from megakor.config.compose import main
from megakor.config.schema import PretrainConfig
from megakor.data.stream import HeldoutSet, PretrainStream
from megakor.tokenizer.tokenizer import Tokenizer
from megakor.train.engine import Engine, SeededValues, Values
from megakor.train.loop import Training, train
from megakor.train.run import check_continues, open_run, process_group, resolve_vocabulary, resume_point


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
            tokens.manifest.check_tokenizer(tokenizer.fingerprint)
        model = resolve_vocabulary(config.model, tokenizer.vocab_size)
        folder = open_run(config, tokenizer)
        checkpoint = resume_point(folder)
        with ExitStack() as stack:
            values: Values = SeededValues(model, size.seed)
            first_step = 0
            if checkpoint is not None:
                values = saved = stack.enter_context(CheckpointValues(checkpoint))
                check_continues(saved.manifest, config, model, tokenizer.fingerprint, stream.state())
                first_step = saved.manifest.step
            engine = Engine(config, model, tokenizer.vocab_size, dims, values)
        train(Training(config, folder, engine, stream, heldout, tokenizer.fingerprint, first_step))


if __name__ == "__main__":
    main("pretrain", run)
