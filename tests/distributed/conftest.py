"""A corpus, tokenizers and shards, made once from the packaged sample by the package's own functions."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakor.config.schema import CorpusConfig, ShardConfig, TrainTokenizerConfig
from megakor.corpus.prepare import prepare
from megakor.data.build import build_shards
from megakor.tokenizer.train import train_tokenizer
from tests.distributed.runs import Made


def make(folder: Path, vocab_size: int, max_bytes: int) -> Made:
    prepare(CorpusConfig(out=str(folder / "corpus"), max_bytes=max_bytes, heldout_ratio=0.1))
    train = [str(folder / "corpus" / "train.jsonl")]
    tokenizer = train_tokenizer(
        TrainTokenizerConfig(inputs=train, out=str(folder / "토크나이저"), vocab_size=vocab_size, num_threads=1)
    )
    made = Made(str(folder / "train"), str(folder / "heldout"), str(folder / "토크나이저"))
    for split in ("train", "heldout"):
        build_shards(
            ShardConfig(
                inputs=[str(folder / "corpus" / f"{split}.jsonl")],
                tokenizer=made.tokenizer,
                out=str(folder / split),
                num_workers=1,
                shard_size=8_000,
            ),
            tokenizer,
        )
    return made


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("made"), 1300, 80_000)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("other"), 1100, 40_000)
