"""Folders of shards that tests share, and an S3 server on this machine."""

from __future__ import annotations

import hashlib
import itertools
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megakor.data.indexed import FileRecord
from megakor.data.remote import RemoteFolder
from tests.data.faulty import Faulty
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


KEYS = {
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "test/secret/0123456789",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    "AWS_CONFIG_FILE": "/nowhere",
    "AWS_MAX_ATTEMPTS": "1",  # the retries under test are ours
}


class Bucket:
    """A folder of objects: `url`, the server's `faults`, and `put`."""

    def __init__(self, faults: Faulty) -> None:
        self.name = uuid.uuid4().hex
        self.url = f"s3://{self.name}/말뭉치 a"
        self.faults = faults
        import fsspec

        self.files = fsspec.filesystem("s3")
        self.files.mkdir(self.name)

    @property
    def folder(self) -> RemoteFolder:
        return RemoteFolder(self.url, max_wait=0.02)

    def put(self, name: str, size: int, seed: int = 0) -> FileRecord:
        """An object of random bytes."""
        content = np.random.default_rng(seed).bytes(size)
        self.files.pipe_file(f"{self.url}/{name}", content)
        return FileRecord(size, hashlib.sha256(content).hexdigest())

    def downloads(self, name: str) -> int:
        return sum(path.endswith(f"/{name}") for path, _ in self.faults.gets)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the bytes of one request, so that small files take several."""
    return lambda size: monkeypatch.setattr("megakor.data.remote.CHUNK", size)
