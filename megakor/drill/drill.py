"""The drill: one run undisturbed, the same run disturbed again and again, and what is left of the difference.

data ─► reference run ─► disturbed run: start, fault, look, start in another layout, … ─► compare step by step
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired
from typing import Any

from rich.console import Console
from rich.table import Table

from megakor.checkpoint.format import CheckpointManifest, committed, step_folder, step_of
from megakor.checkpoint.reader import newest_whole
from megakor.config.schema import DrillConfig
from megakor.drill.faults import FAULTS, POLL_SECONDS, Damage, Scene, end
from megakor.launch.command import launched
from megakor.logs import get_logger
from megakor.train.exit_record import read_exit
from megakor.train.metrics import read_metrics

log = get_logger(__name__)

TINY = [
    "model=debug", "model.hidden_size=32", "model.num_hidden_layers=4", "model.num_attention_heads=2",
    "model.intermediate_size=64", "model.max_position_embeddings=64", "train.global_batch_size=8",
    "train.micro_batch_size=2", "train.sequence_length=32", "train.precision=fp32", "optimizer.lr=1e-3",
    # With Adam's usual eps, gradients that are rounding alone are divided by their own size, and layouts drift apart.
    "optimizer.eps=1e-6", "checkpoint.interval=10", "checkpoint.restart_interval=3", "checkpoint.keep_last=3",
    "evaluation.interval=0", "logging.wandb=disabled", "logging.peak_tflops=0.1", "launch.pause_seconds=0",
]  # fmt: skip
"""A run whose steps take hundredths of a second."""

LAYOUTS: dict[str, list[str]] = {
    "ZeRO-1": [],
    "ZeRO-2": ["parallel.zero_stage=2"],
    "ZeRO-3": ["parallel.zero_stage=3"],
    "tensor 2": ["parallel.tensor_parallel_size=2"],
    "pipeline 2": ["parallel.pipeline_parallel_size=2"],
    "micro-batch 1": ["train.micro_batch_size=1"],
}
"""Layouts of an even number of ranks."""

STEPS_BEFORE, STEPS_PER_FAULT = 10, 20
TOLERANCE = 1e-4
"""Of final losses across layouts in fp32."""


@dataclass(frozen=True)
class Event:
    """A start of the disturbed run.

    Attributes:
        layout: of this start.
        began_at: step that it went on from.
        ended_at: last step that it logged.
        words: what befell it.
        seconds: that it took.
    """

    layout: str
    began_at: int
    ended_at: int
    words: str
    seconds: float


@dataclass
class Findings:
    """What a drill found; all is well when `problems` is empty."""

    faults: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    lost_committed_steps: int = 0
    undetected_corruptions: int = 0
    hangs: int = 0
    steps_compared: int = 0
    token_order_equal: bool = False
    bitwise_equal: bool = False
    largest_loss_difference: float = float("inf")
    final_loss_difference: float = float("inf")
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class Drill:
    """A drill in a folder.

    Args:
        config: what is asked for.
        data: overrides that name shards and tokenizer.
    """

    def __init__(self, config: DrillConfig, data: list[str]) -> None:
        self.config, self.data = config, data
        self.folder = Path(config.run)
        self.dice = random.Random(config.seed)
        self.events: list[Event] = []
        self.found = Findings()
        self.num_steps = STEPS_BEFORE + STEPS_PER_FAULT * max(1, config.faults)
        self.run = self.folder / "disturbed"
        self.damaged: set[int] = set()

    def hold(self) -> Findings:
        """Hold it; returns what was found."""
        begin = time.monotonic()
        reference = self.folder / "reference"
        log.info("undisturbed: %d steps", self.num_steps)
        self.await_end(self.start(reference, "ZeRO-1"), "the undisturbed run")
        if (record := read_exit(reference)) is None or record.outcome != "finished":
            raise OSError(f"run={reference}: the undisturbed run must finish; see its error above")
        kinds: Counter[str] = Counter()
        layout = "ZeRO-1"
        while self.found.faults < self.config.faults and self.last_step() < self.num_steps:
            if self.config.layouts and self.dice.random() < 0.4:
                layout = self.dice.choice(sorted(LAYOUTS))
            fault = self.dice.choices(list(FAULTS), list(FAULTS.values()))[0]
            self.disturbed(layout, fault)
            self.found.faults += 1
            kinds[fault.__name__] += 1
        self.undisturbed_end()
        self.found.kinds = dict(kinds)
        self.compare(reference)
        self.found.seconds = round(time.monotonic() - begin, 1)
        return self.found

    def start(self, run: Path, layout: str) -> Popen[bytes]:
        """Start a run, or go on with it."""
        overrides = [
            *TINY, f"run={run}", f"train.num_steps={self.num_steps}", *self.data, *LAYOUTS[layout],
            *self.config.training,
        ]  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        output = (self.folder / "output.txt").open("ab")
        command = launched("pretrain", self.config.num_ranks, overrides)
        return Popen(command, stdout=output, stderr=output, stdin=DEVNULL, start_new_session=True)

    def last_step(self) -> int:
        """The last step that the disturbed run has logged, of any start."""
        return max((record["step"] for record in read_metrics(self.run) if record["kind"] == "train"), default=0)

    def starts(self) -> list[int]:
        """The step that each start of the disturbed run went on from."""
        return [record["step"] for record in read_metrics(self.run) if record["kind"] == "start"]

    def await_end(self, launcher: Popen[bytes], what: str) -> None:
        """Wait for a run to end by itself; one that does not is a hang."""
        try:
            launcher.wait(self.config.patience_seconds)
        except TimeoutExpired:
            end(launcher)
            self.found.hangs += 1
            self.problem(f"{what} did not end within patience_seconds={self.config.patience_seconds}")

    def await_steps(self, launcher: Popen[bytes], starts: int, target: int) -> None:
        """Wait until this start has logged a step, or has ended; one that does neither is a hang."""
        deadline = time.monotonic() + self.config.patience_seconds
        while launcher.poll() is None:
            if len(self.starts()) > starts and self.last_step() >= target:
                return
            if time.monotonic() > deadline:
                self.found.hangs += 1
                self.problem(f"step {target} was not reached within patience_seconds={self.config.patience_seconds}")
                return
            time.sleep(POLL_SECONDS)

    def disturbed(self, layout: str, fault: Any) -> None:
        """A start, and what befalls it."""
        begin, expected, starts = time.monotonic(), self.newest(), len(self.starts())
        launcher = self.start(self.run, layout)
        self.await_steps(launcher, starts, min(expected + self.dice.randint(1, STEPS_PER_FAULT), self.num_steps - 1))
        before = self.committed_steps()
        damage: Damage = fault(Scene(self.run, launcher, self.dice))
        self.await_end(launcher, f"the run after {damage.words}")
        self.damaged = {step for step in self.damaged if not self.is_whole(step)}  # others were saved anew
        if damage.damaged is not None:
            self.damaged.add(damage.damaged)
        self.judge(starts, expected, before, damage.damaged)
        began = self.starts()[starts] if len(self.starts()) > starts else expected
        event = Event(layout, began, self.last_step(), damage.words, round(time.monotonic() - begin, 1))
        self.events.append(event)
        log.info("%d/%d %s", self.found.faults + 1, self.config.faults, event)

    def judge(self, starts: int, expected: int, before: dict[int, bool], damaged: int | None = None) -> None:
        """Whether a start went on from where it had to, and what was committed is there still.

        Args:
            starts: those before.
            expected: the step that it had to go on from.
            before: `committed_steps` while it ran.
            damaged: step that was damaged on purpose; had it been committed meanwhile, those that it replaces went.
        """
        new = self.starts()[starts:]
        if not new:
            self.problem(f"a start that should go on from step {expected} did not begin; see {self.folder}/output.txt")
        elif new[0] > expected:
            self.found.undetected_corruptions += 1
            self.problem(f"a start went on from step {new[0]}, which is damaged; {expected} was the newest whole one")
        elif new[0] < expected:
            self.found.lost_committed_steps += expected - new[0]
            self.problem(f"a start went on from step {new[0]}; {expected} was committed and whole")
        replaced = {step for step, kept in before.items() if damaged is not None and step < damaged and not kept}
        whole = before.keys() - self.damaged - replaced
        if whole and self.newest() < max(whole):
            self.found.lost_committed_steps += max(whole) - self.newest()
            self.problem(f"step {max(whole)} was committed and is lost; {self.newest()} is the newest whole one")

    def committed_steps(self) -> dict[int, bool]:
        """Steps that must be there from now on, the newest and those that it does not replace; whether a later one
        leaves each there, too."""
        found = {}
        for folder in committed(self.run):
            with suppress(ValueError):  # one that was damaged
                found[step_of(folder)] = CheckpointManifest.load(folder).kept
        return {step: kept for step, kept in found.items() if kept or step == max(found)}

    def newest(self) -> int:
        """Step of the newest whole checkpoint, every byte of which is looked at; 0: none."""
        folder = newest_whole(self.run, contents=True)
        return step_of(folder) if folder is not None else 0

    def is_whole(self, step: int) -> bool:
        folder = step_folder(self.run, step)
        try:
            CheckpointManifest.load(folder).check_contents(folder)
        except ValueError:
            return False
        return True

    def undisturbed_end(self) -> None:
        """Let the disturbed run finish."""
        begin, expected, starts = time.monotonic(), self.newest(), len(self.starts())
        self.await_end(self.start(self.run, "ZeRO-1"), "the last start")
        if expected < self.num_steps:
            self.judge(starts, expected, {})
        self.events.append(Event("ZeRO-1", expected, self.last_step(), "nothing", round(time.monotonic() - begin, 1)))

    def compare(self, reference: Path) -> None:
        """Step by step: the rows of each batch, the loss, the norm."""
        expected, found = ({record["step"]: record for record in read_metrics(run) if record["kind"] == "train"}
                           for run in (reference, self.run))  # fmt: skip
        steps = range(1, self.num_steps + 1)
        missing = [step for step in steps if step not in found]
        if missing:
            self.problem(f"steps {missing[:5]} … were not taken")
            return
        self.found.steps_compared = len(steps)
        digests = [step for step in steps if found[step]["batch_digest"] != expected[step]["batch_digest"]]
        self.found.token_order_equal = not digests
        if digests:
            self.problem(f"step {digests[0]} and {len(digests) - 1} others saw other tokens")
        differences = [abs(found[step]["loss"] - expected[step]["loss"]) for step in steps]
        self.found.largest_loss_difference, self.found.final_loss_difference = max(differences), differences[-1]
        keys = ("loss", "grad_norm")
        self.found.bitwise_equal = all(found[step][key] == expected[step][key] for step in steps for key in keys)
        layouts = {event.layout for event in self.events}
        if layouts == {"ZeRO-1"} and not self.found.bitwise_equal:
            self.problem("in one layout, every loss and norm must be equal to the last bit")
        if self.found.final_loss_difference > TOLERANCE:
            self.problem(f"the final loss differs by {self.found.final_loss_difference:.2g}, more than {TOLERANCE:.0e}")

    def problem(self, words: str) -> None:
        log.error("%s", words)
        self.found.problems.append(words)

    def tell(self) -> None:
        """The table of all starts, and the findings as JSON, last."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("start", "layout", "from", "to", "what befell it", "seconds"):
            table.add_column(column, overflow="fold")
        for number, event in enumerate(self.events, start=1):
            table.add_row(*map(str, (number, *asdict(event).values())))
        Console(width=None if Console().is_terminal else 140).print(table, markup=False)
        print(json.dumps(asdict(self.found), ensure_ascii=False))
