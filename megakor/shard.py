"""`megakor shard`: tokenise text files into Megatron .bin/.idx shards with a manifest."""

from __future__ import annotations

from megakor.config.compose import main
from megakor.config.schema import ShardConfig
from megakor.data.build import build_shards
from megakor.tokenizer.tokenizer import Tokenizer


def run(config: ShardConfig) -> None:
    """Write the shards and `manifest.json`."""
    build_shards(config, Tokenizer.load(config.tokenizer))


if __name__ == "__main__":
    main("shard", run)
