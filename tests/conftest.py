"""Two workers share two cores (`make test`), so each computes on one; and one S3 server for the tests of a process."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator

import pytest
import torch
import torch.distributed as dist

from tests.data.conftest import KEYS, Bucket
from tests.data.faulty import Faulty, s3_server

LONGEST = ("test_readme", "test_resume", "test_drill", "test_matrix", "test_guard", "test_launcher", "test_killed")
"""Files that take a minute or more: begun first, so that no worker is left alone with one at the end."""

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    gc.disable()  # half of the time would go to the collector
    result = yield
    gc.freeze()  # what was imported: DeepSpeed collects six times for every engine
    gc.enable()
    return result


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
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
