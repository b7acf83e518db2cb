"""How well the order shuffles, against a permutation of all samples.

    python -m tests.benchmarks.shuffle

256 shards of 1,024 samples. Each sample has a value, its shard's plus its own, of equal variance: shards differ, as
they do when text was not shuffled before it was sharded. A loss that follows the values would show how well they are
mixed: `std` is the deviation of the means of batches of 256 over that of a true permutation's, `lag 1` the correlation
of the means of neighbouring batches, `neighbours` that of neighbouring samples. `open` is the part of all shards that
is read from at a time. Over eight seeds; the last line is one JSON object.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from megakor.data.order import SourceOrder

NUM_SHARDS, NUM_SAMPLES, BATCH = 256, 1024, 256
CASES = {"64 streams, windows of 4 shards": (64, 4096), "64 streams, of 2": (64, 2048), "64 streams, of 1": (64, 1024),
         "8 streams, of 32": (8, 32768), "8 streams, of 4": (8, 4096), "1 stream, of 4": (1, 4096),
         "1 stream, of 64": (1, 65536)}  # fmt: skip


def correlation(values: np.ndarray) -> float:
    return float(np.corrcoef(values[:-1], values[1:])[0, 1])


def figures(order: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """Deviation of batch means, their correlation, and that of samples."""
    ordered = values[order]
    means = ordered.reshape(-1, BATCH).mean(axis=1)
    return float(means.std()), correlation(means), correlation(ordered)


def measure(num_streams: int, window: int, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The figures of an order and of a permutation."""
    generator = np.random.default_rng(seed)
    values = (generator.normal(size=(NUM_SHARDS, 1)) + generator.normal(size=(NUM_SHARDS, NUM_SAMPLES))).ravel()
    order = SourceOrder(np.full(NUM_SHARDS, NUM_SAMPLES), seed=seed, num_streams=num_streams, window=window)
    places = order.at(np.arange(len(values)))
    ours = figures(places.shards * NUM_SAMPLES + places.samples, values)
    return ours, figures(generator.permutation(len(values)), values)


def main() -> None:
    found: dict[str, Any] = {}
    print("| order | std | lag 1 | neighbours | open |\n|---|---|---|---|---|")
    for name, (num_streams, window) in CASES.items():
        ours, true = (
            np.mean(column, axis=0) for column in zip(*(measure(num_streams, window, s) for s in range(8)), strict=True)
        )
        found[name] = {"std": ours[0] / true[0], "lag_1": ours[1], "neighbours": ours[2]}
        cells = (f"{value:.2f}" for value in found[name].values())
        print(f"| {name} | {' | '.join(cells)} | {num_streams * window / (NUM_SHARDS * NUM_SAMPLES):.3g} |")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
