from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.data.tokens import write_shards

EOD = 60_000 - 1
NUM_TOKENS = 1000
CUTS = [0, 1, 7, 300, 301, 640, NUM_TOKENS]
"""Where shards begin."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token i of the shards laid end to end is i, in shards and documents of uneven lengths."""
    folder = tmp_path_factory.mktemp("shards")
    shards = []
    for start, end in itertools.pairwise(CUTS):
        middle = (start + end) // 2
        documents = [list(range(start, middle)), list(range(middle, end))]
        shards.append([document for document in documents if document])
    write_shards(folder, shards, eod_id=EOD)
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another source: tokens from 20,000 on."""
    folder = tmp_path_factory.mktemp("small")
    write_shards(folder, [[list(range(20_000, 20_050))], [list(range(30_000, 30_121))]], eod_id=EOD)
    return folder
