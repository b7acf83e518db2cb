"""The configuration's types of the verbs that make shards of text."""

from __future__ import annotations

from dataclasses import dataclass

from megakor.config.choices import OnError, TokenizerKind
from megakor.config.fields import key


@dataclass
class CorpusConfig:
    """Gather raw text into one corpus with a held-out split."""

    inputs: list[str] = key([], help=".txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet files or globs; empty: the sample")
    out: str = key(help="folder for train.jsonl, heldout.jsonl and corpus.json")
    text_key: str = key("text", help="field of the text in .jsonl and .parquet")
    id_key: str = key("id", help="field of the document's id, where there is one")
    heldout_ratio: float = key(0.05, help="share of the documents held out, chosen by a hash of the text")
    max_bytes: int | None = key(
        None, help="take documents evenly over all inputs up to so much text; null: all", unit="bytes"
    )
    on_error: OnError = key(OnError.stop, help="a record that cannot be read: stop or skip")


@dataclass
class TrainTokenizerConfig:
    """Train a SentencePiece tokenizer that keeps every character of Korean text."""

    inputs: list[str] = key(help="text files or globs, as for corpus")
    out: str = key(help="folder for tokenizer.model and tokenizer.meta.json")
    kind: TokenizerKind = key(TokenizerKind.bpe, help="segmentation model")
    vocab_size: int | None = key(
        None, help="pieces, special tokens included; null: sized to the text, at most 30,000", unit="pieces"
    )
    character_coverage: float = key(0.9995, help="share of characters with pieces of their own; the rest are bytes")
    max_bytes: int | None = key(None, help="train on at most so much text, taken evenly; null: all", unit="bytes")
    num_threads: int = key(2, help="threads of the trainer")
    text_key: str = key("text", help="field of the text in .jsonl and .parquet")
    on_error: OnError = key(OnError.stop, help="a record that cannot be read: stop or skip")


@dataclass
class ShardConfig:
    """Tokenise text into Megatron .bin/.idx shards with a manifest."""

    inputs: list[str] = key(help="text files or globs, as for corpus")
    tokenizer: str = key(help="folder of the tokenizer")
    out: str = key(help="folder for the shards and manifest.json")
    shard_size: int = key(64_000_000, help="a shard is closed at the first document past this", unit="tokens")
    num_workers: int = key(2, help="processes that tokenise")
    text_key: str = key("text", help="field of the text in .jsonl and .parquet")
    id_key: str = key("id", help="field of the document's id, where there is one")
    on_error: OnError = key(OnError.stop, help="a record that cannot be read: stop or skip")
