"""A drill of five faults under the real launcher; and that it would notice what must not happen."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megakor.config.schema import DrillConfig
from megakor.drill import faults
from megakor.drill.drill import LAYOUTS, Drill, Event
from megakor.drill.faults import FAULTS, Scene
from megakor.train.metrics import METRICS
from tests.checkpoint.pieces import save


def test_five_faults(tmp_path: Path) -> None:
    """Nothing is lost, nothing damaged is read, nothing hangs, and the losses are those of the undisturbed run."""
    command = [sys.executable, "-m", "megakor", "drill", f"run={tmp_path / '훈련'}", "faults=5", "seed=4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["faults"], found["steps_compared"], found["token_order_equal"]) == (5, 110, True)
    assert (found["lost_committed_steps"], found["undetected_corruptions"], found["hangs"]) == (0, 0, 0)
    assert found["final_loss_difference"] <= 1e-4
    assert found["problems"] == []
    assert sum(found["kinds"].values()) == 5
    assert len(found["kinds"]) >= 3


@pytest.fixture
def drill(tmp_path: Path) -> Drill:
    """One that has one fault behind it, on ten steps, without a launcher."""
    drill = Drill(DrillConfig(run=str(tmp_path), faults=1), [])
    drill.num_steps = 10
    for run in (tmp_path / "reference", drill.run):
        run.mkdir()
        write(run, [{"kind": "start", "step": 0}, *(train(step) for step in range(1, 11))])
    return drill


def train(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "loss": 5 - step / 10,
        "grad_norm": 1.0,
        "batch_digest": f"{step:x}",
        **changes,
    }


def write(run: Path, records: list[dict[str, Any]]) -> None:
    with (run / METRICS).open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_the_same(drill: Drill) -> None:
    drill.events = [Event("ZeRO-1", 0, 10, "nothing", 1.0)]
    drill.compare(drill.folder / "reference")
    assert drill.found.problems == []
    assert drill.found.bitwise_equal
    assert drill.found.token_order_equal


@pytest.mark.parametrize(("record", "layout", "words"), [
    (train(7, batch_digest="0"), "ZeRO-1", "step 7 and 0 others saw other tokens"),
    (train(7, loss=4.3000001), "ZeRO-1", "in one layout, every loss and norm must be equal to the last bit"),
    (train(10, loss=4.0011), "tensor 2", "the final loss differs by 0.0011, more than 1e-04"),
])  # fmt: skip
def test_what_differs_is_noticed(drill: Drill, record: dict[str, Any], layout: str, words: str) -> None:
    write(drill.run, [record])
    drill.events = [Event(layout, 0, 10, "nothing", 1.0)]
    drill.compare(drill.folder / "reference")
    assert drill.found.problems == [words]


def test_steps_that_are_missing_are_noticed(drill: Drill) -> None:
    drill.num_steps = 11
    drill.compare(drill.folder / "reference")
    assert drill.found.problems == ["steps [11] … were not taken"]


KEPT, FOR_RESTARTS = True, False
LOST = "step 15 was committed and is lost; 10 is the newest whole one"


@pytest.mark.parametrize(("went_on_from", "before", "damaged", "lost", "undetected", "words"), [
    ([10], {10: KEPT}, None, 0, 0, []),
    ([5], {5: KEPT, 10: KEPT}, None, 5, 0, ["a start went on from step 5; 10 was committed and whole"]),
    ([12], {10: KEPT}, None, 0, 1, ["a start went on from step 12, which is damaged; 10 was the newest whole one"]),
    ([10], {10: KEPT, 15: KEPT}, None, 5, 0, [LOST]),
    ([10], {10: KEPT, 15: FOR_RESTARTS}, None, 5, 0, [LOST]),
    ([10], {10: KEPT, 15: KEPT}, 18, 5, 0, [LOST]),
    ([10], {10: KEPT, 15: FOR_RESTARTS}, 12, 5, 0, [LOST]),
    ([10], {10: KEPT, 15: FOR_RESTARTS}, 18, 0, 0, []),  # 18 had replaced it, and was damaged then
    ([], {10: KEPT}, None, 0, 0, ["a start that should go on from step 10 did not begin"]),
])  # fmt: skip
def test_judgement(
    drill: Drill, alone: None, went_on_from: list[int], before: dict[int, bool], damaged: int | None, lost: int,
    undetected: int, words: list[str],
) -> None:  # fmt: skip
    save(drill.run, 10)
    write(drill.run, [{"kind": "start", "step": step} for step in went_on_from])
    drill.judge(starts=1, expected=10, before=before, damaged=damaged)
    assert (drill.found.lost_committed_steps, drill.found.undetected_corruptions) == (lost, undetected)
    assert len(drill.found.problems) == len(words)
    assert all(found.startswith(expected) for found, expected in zip(drill.found.problems, words, strict=True))


def test_a_hang_is_noticed(drill: Drill) -> None:
    drill.config.patience_seconds = 0.5
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    drill.await_end(sleeper, "the sleeper")
    assert sleeper.poll() is not None
    assert drill.found.hangs == 1
    assert "the sleeper did not end within patience_seconds=0.5" in drill.found.problems[0]


def test_every_damage_to_a_file_is_one(drill: Drill, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the drill does to a checkpoint must be a damage, or it would prove nothing."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    words = set()
    for seed in range(12):
        save(drill.run, 10)
        assert drill.newest() == 10
        damage = faults.damage_a_file(Scene(drill.run, ended, random.Random(seed)))
        assert damage.damaged == 10
        assert drill.newest() == 0, damage.words
        words.add(damage.words.split(";")[1].split()[0])
    assert words == {"flipped", "cut", "removed", "added"}


def test_what_there_is() -> None:
    assert len(FAULTS) >= 6
    assert len(LAYOUTS) >= 4


@pytest.mark.parametrize(("overrides", "message"), [
    (["num_ranks=3"], "num_ranks=3 must be an even number"),
    (["data=somewhere"], "data=somewhere must come with tokenizer, or neither"),
    (["faults=0"], "faults=0 must be above 0"),
    (["run=."], "run=. must be a folder of its own"),
])  # fmt: skip
def test_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megakor", "drill", *overrides], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
