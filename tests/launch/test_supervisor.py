"""When a run is started again, with how many ranks, and when it is given up; runs are small scripts here."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megakor.config.schema import PretrainConfig
from megakor.launch.command import Command, launched
from megakor.launch.layout import largest_world_size
from megakor.launch.supervisor import GivenUp, Supervisor
from megakor.train.exit_record import ExitRecord
from tests.distributed.runs import Made, configuration

RUN = """
import json, os, sys, time
from pathlib import Path
folder, world_size, first, last, ends = Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5]
with (folder / "metrics.jsonl").open("a") as file:
    if ends != "never began":
        file.write(json.dumps({"kind": "start", "step": first, "world_size": world_size}) + "\\n")
    for step in range(first + 1, last + 1):
        file.write(json.dumps({"kind": "train", "step": step}) + "\\n")
if ends == "waits":
    while not (folder / "STOP").exists():
        time.sleep(0.01)
    ends = "stopped"
if ends in ("finished", "stopped", "failed"):
    record = {"outcome": ends, "reason": "까닭", "step": last, "checkpoint": None, "world_size": world_size}
    (folder / "exit.json").write_text(json.dumps(record))
sys.exit(0 if ends in ("finished", "stopped", "nothing") else 1)
"""


class Case:
    """Starts as (first step, last step, how it ends), one after the other."""

    def __init__(
        self, run: Path, starts: list[tuple[int, int, str]], slots: list[int] | None = None, **keys: Any
    ) -> None:
        run.mkdir()
        self.config = configuration(Made("", "", ""), run, **{f"launch__{key}": value for key, value in keys.items()})
        self.left, self.slots, self.pauses = list(starts), list(slots or [2] * len(starts)), list[float]()
        self.sizes: list[int] = []
        self.supervisor = Supervisor(self.config, self.command, lambda: self.slots.pop(0), self.pauses.append)

    def command(self, world_size: int) -> Command:
        self.sizes.append(world_size)
        first, last, ends = self.left.pop(0)
        return Command([sys.executable, "-c", RUN, self.config.run, str(world_size), str(first), str(last), ends])


def test_until_it_finishes(tmp_path: Path) -> None:
    case = Case(tmp_path / "실행", [(0, 7, "killed"), (5, 9, "failed"), (5, 12, "finished")], restarts=5)
    assert case.supervisor.supervise() == ExitRecord("finished", "까닭", 12, None, 2)
    first, second = case.pauses
    assert 5 <= first <= 10 <= second <= 20


def test_a_stopped_run_is_left_alone(tmp_path: Path) -> None:
    case = Case(tmp_path / "run", [(0, 7, "stopped")], restarts=5)
    assert case.supervisor.supervise().outcome == "stopped"


def test_nothing_left_to_do(tmp_path: Path) -> None:
    case = Case(tmp_path / "run", [(7, 7, "nothing")])
    assert case.supervisor.supervise().outcome == "finished"


@pytest.mark.parametrize(("starts", "restarts", "message"), [
    ([(0, 7, "killed"), (5, 7, "failed")], 9, r"failed after step 7 twice, so that no start helps: 까닭"),
    ([(0, 7, "killed"), (5, 8, "killed")], 1, r"failed after step 8 and launch\.restarts=1 are used up: it was killed"),
    ([(0, 0, "failed")], 0, r"failed before its first step and launch\.restarts=0 are used up"),
    ([(0, 0, "never began"), (0, 0, "never began")], 9, r"first step twice, .* never began \(exit status 1\)"),
    ([(0, 7, "killed"), (0, 0, "never began"), (0, 0, "never began")], 9, r"before its first step twice"),
])  # fmt: skip
def test_given_up(tmp_path: Path, starts: list[tuple[int, int, str]], restarts: int, message: str) -> None:
    case = Case(tmp_path / "run", starts, restarts=restarts)
    with pytest.raises(GivenUp, match=message):
        case.supervisor.supervise()
    assert case.left == []


def test_on_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight slots, then seven of which a replica of two takes six, then all again."""
    starts = [(0, 5, "killed"), (5, 9, "killed"), (5, 12, "finished")]
    case = Case(tmp_path / "run", starts, [8, 7, 8], restarts=2, elastic=True, num_ranks=8)
    case.config.parallel.tensor_parallel_size = 2
    said: list[str] = []
    monkeypatch.setattr("megakor.launch.supervisor.log.warning", lambda text, *rest: said.append(text % rest))
    case.supervisor.supervise()
    assert case.sizes == [8, 6, 8]
    assert said == ["going on with 6 ranks of launch.num_ranks=8; 1 of 7 slots are idle"]


def test_not_elastic(tmp_path: Path) -> None:
    case = Case(tmp_path / "run", [(0, 5, "killed")], [8, 7], restarts=2, num_ranks=8)
    with pytest.raises(GivenUp, match=r"launch\.num_ranks=8 must be at most the 7 slots that are there"):
        case.supervisor.supervise()


@pytest.mark.parametrize(("changes", "slots", "size"), [
    ({}, 7, 7),
    ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, 31, 28),
    ({"tensor_parallel_size": 2, "data_parallel_size": 3}, 31, 6),
    ({"context_parallel_size": 4}, 4, 4),
])  # fmt: skip
def test_largest_layout(changes: dict[str, int], slots: int, size: int) -> None:
    parallel = PretrainConfig().parallel
    for name, value in changes.items():
        setattr(parallel, name, value)
    assert largest_world_size(parallel, slots) == size


def test_no_room_for_a_replica() -> None:
    parallel = PretrainConfig().parallel
    parallel.tensor_parallel_size = 4
    with pytest.raises(ValueError, match=r"3 slots must hold at least one replica: .*_size=4 .* = 4 ranks"):
        largest_world_size(parallel, 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_the_run_by_its_file(tmp_path: Path, number: int) -> None:
    case = Case(tmp_path / "run", [(0, 7, "waits")], restarts=5)

    def send() -> None:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    assert case.supervisor.supervise().outcome == "stopped"
    sender.join()
    assert signal.getsignal(number) is signal.SIG_DFL


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = launched("instruct", 3, ["run=실행"])
    assert command[1:3] == ["--num_gpus", "3"]
    assert command[-4:] == ["error", "--module", "megakor.instruct", "run=실행"]
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="the `deepspeed` command must be on PATH"):
        launched("pretrain", 2, [])


def test_records_are_read_as_they_are_written(tmp_path: Path) -> None:
    case = Case(tmp_path / "run", [(0, 3, "finished")])
    record = case.supervisor.supervise()
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["step"] == record.step == 3
