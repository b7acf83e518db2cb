"""`megakor corpus`: gather raw text into one corpus with a held-out split."""

from __future__ import annotations

from megakor.config.compose import main
from megakor.config.schema import CorpusConfig
from megakor.corpus.prepare import prepare


def run(config: CorpusConfig) -> None:
    """Write `train.jsonl`, `heldout.jsonl` and `corpus.json`."""
    prepare(config)


if __name__ == "__main__":
    main("corpus", run)
