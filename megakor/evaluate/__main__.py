"""`megakor evaluate`: bits per byte on held-out shards, beside a unigram and an order-0 model."""

from __future__ import annotations

import json

from megakor.config.compose import main
from megakor.config.schema import EvaluateConfig
from megakor.evaluate.bits_per_byte import evaluate


def run(config: EvaluateConfig) -> None:
    """Print the figures as one JSON object."""
    print(json.dumps(evaluate(config)))


if __name__ == "__main__":
    main("evaluate", run)
