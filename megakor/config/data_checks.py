"""The rules of what a model is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megakor.config.data_schema import DataConfig
from megakor.config.rules import positive, require


def check_weights(key: str, weights: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise unless there is a weight for each source, none negative and not all 0."""
    require(set(weights) == set(names), key, dict(weights), f"have one weight for each of data.sources: {list(names)}")
    fits = all(isinstance(weight, int | float) and 0 <= weight < float("inf") for weight in weights.values())
    require(fits and any(weights.values()), key, dict(weights), "be numbers that are not negative, and not all 0")


def check_data(data: DataConfig) -> None:
    """The rules of what is trained on."""
    given = [name for name in ("train", "sources", "dataset") if getattr(data, name) not in (None, {})]
    if len(given) != 1:
        rule = f"must be given, not {' and '.join(given) or 'none'}"
        raise ValueError(f"one of data.train=, data.sources= and data.dataset= {rule}")
    positive("data.shuffle_buffer", data.shuffle_buffer, allow_zero=True)
    names = list(data.named_sources)
    if data.weights:
        check_weights("data.weights", data.weights, data.sources)
        rule = "be 1 with data.weights, which say all"
        require(data.temperature == 1, "data.temperature", data.temperature, rule)
    for tokens, weights in data.curriculum.items():
        require(tokens > 0, "data.curriculum", tokens, "have keys above 0; data.weights hold from the start")
        check_weights(f"data.curriculum.{tokens}", weights, data.sources)
    for name, epochs in data.max_epochs.items():
        require(name in names, "data.max_epochs", name, f"name one of data.sources: {names}")
        positive(f"data.max_epochs.{name}", epochs)
    for key in ("temperature", "num_streams", "shuffle_window", "cache_size"):
        positive(f"data.{key}", getattr(data, key))
    for window in data.skip:
        fits = len(window) == 2 and 0 <= window[0] < window[1]
        require(fits, "data.skip", window, "be [first, one after the last]")
