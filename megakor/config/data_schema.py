"""The configuration's types of what a model is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megakor.config.fields import key


@dataclass
class DataConfig:
    """Shard folders, as `megakor shard` writes them."""

    train: str | None = key(None, help="folder or URL of the training shards; null: data.sources")
    sources: dict[str, str] = key({}, help="several folders of training shards: name -> folder")
    dataset: dict[str, Any] = key(
        {}, help="instead of shards, for small jobs: arguments of datasets.load_dataset, tokenised as it is read"
    )
    text_key: str = key("text", help="with data.dataset: column of the text")
    shuffle_buffer: int = key(
        10_000, help="with data.dataset: records among which each is drawn; 0: its own order", unit="records"
    )
    weights: dict[str, float] = key(
        {}, help="each source's part of the stream, over the sum of all; {}: by tokens ** (1 / temperature)"
    )
    temperature: float = key(1.0, help="without weights; 1: in proportion to tokens, higher: small sources more often")
    max_epochs: dict[str, int] = key({}, help="times that a source is read through, at most; any number without one")
    curriculum: dict[int, Any] = key(
        {}, help="weights that change: tokens of the stream -> name -> weight from there on", unit="tokens"
    )
    skip: list[list[int]] = key(
        [], help="stretches of the stream to leave out: [first, one after the last]; megakor trace tells them",
        unit="samples",
    )  # fmt: skip
    num_streams: int = key(64, help="parts of the stream that nodes share out; a number of nodes should divide it")
    shuffle_window: int = key(65536, help="samples of such a part that are shuffled together", unit="samples")
    separate_documents: bool = key(
        False, help="positions begin anew, and attention ends, where a document does; false: rows are one stretch"
    )
    cache: str | None = key(
        None, help="folder on a disk of each node for shards that are elsewhere (s3://, gs://, hf://)"
    )
    cache_size: int = key(100 * 2**30, help="most that it holds; what was used longest ago makes room", unit="bytes")
    accept_changed: list[str] = key(
        [], help="shards that may differ from those that the run began with: file names, or source/file"
    )
    validation: dict[str, str] = key({}, help="named held-out sets: name -> folder of shards")
    tokenizer: str = key(help="folder of the tokenizer that made the shards")

    @property
    def named_sources(self) -> dict[str, str]:
        """The folder of each source; a single one has no name."""
        return self.sources or {"": str(self.train)}
