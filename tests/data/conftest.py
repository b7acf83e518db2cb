"""An S3 bucket for the tests of remote shards."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from megakor.data.indexed import FileRecord
from megakor.data.remote import RemoteFolder
from tests.data.faulty import Faulty, s3_server

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


@pytest.fixture(scope="session")
def s3_faults() -> Iterator[Faulty]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with pytest.MonkeyPatch.context() as patch, s3_server() as (address, faults):
        for key, value in {**KEYS, "AWS_ENDPOINT_URL": address}.items():
            patch.setenv(key, value)
        yield faults


@pytest.fixture
def bucket(s3_faults: Faulty) -> Iterator[Bucket]:
    s3_faults.reset()
    yield Bucket(s3_faults)
    s3_faults.reset()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the bytes of one request, so that small files take several."""
    return lambda size: monkeypatch.setattr("megakor.data.remote.CHUNK", size)
