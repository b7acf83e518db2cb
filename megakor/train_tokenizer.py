"""`megakor train-tokenizer`: train a SentencePiece tokenizer on text files."""

from __future__ import annotations

from megakor.config.compose import main
from megakor.config.schema import TrainTokenizerConfig
from megakor.tokenizer.train import train_tokenizer


def run(config: TrainTokenizerConfig) -> None:
    """Write `tokenizer.model` and `tokenizer.meta.json`."""
    train_tokenizer(config)


if __name__ == "__main__":
    main("train-tokenizer", run)
