"""Hosts, where this machine permits them, and the run that theirs are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster.hosts import Cluster, missing
from tests.cluster.training import overrides
from tests.config.commands import command
from tests.distributed.conftest import make
from tests.distributed.runs import Made


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, before anything is made for it, a test of hosts which this machine cannot have, or of missing programs."""
    assert isinstance(item, pytest.Function)
    if not getattr(item.module, "NAMESPACES", True):
        return
    if why := missing(*getattr(item.module, "PROGRAMS", ())):
        pytest.skip(why)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("made"), 1300, 80_000)


@pytest.fixture(scope="session")
def undisturbed(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run in one process on this machine."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = command("-m", "megakor.pretrain", *overrides(made, run))
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[[int], Cluster]]:
    """Brings so many hosts up, for one test."""
    with ExitStack() as stack:
        folder = tmp_path / "cluster"
        folder.mkdir()
        yield lambda num_hosts: stack.enter_context(Cluster(folder, num_hosts))
