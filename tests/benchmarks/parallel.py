"""Speed of two processes with one thread each over one process with two threads: data, tensor and pipeline parallel.

    python -m tests.benchmarks.parallel [--rounds 4] [--precision bf16 …] [--layout dp2 …] [--profile]

All sides train the same model on the same global batch in 8 micro-batches with megakor's engine on gloo: so a ratio of
1 says that splitting costs nothing. The model has 5 blocks of width 512 and sequences of 512
tokens. Its output projection costs about as much as a block, so that two equal stages are a fair cut
(embedding and 3 blocks; 2 blocks, norm and projection); for 8 micro-batches over 2 stages the limit is then 8 / 9.

Every process lives through the whole run, and they take turns: one side makes a step while the others sleep in a pipe.
First all make the same steps, and their losses must agree; that is the warm-up as well. A ratio is of two turns in the
same round; the figures are medians over the rounds. `cpu_ratio` compares processor time, so it sees the work that
splitting adds but not the waiting. Ranks are bound to a core each, as launchers do; the one process has both cores.
`apart` is two such processes that do not know each other, each with half of the batch: what is to be had at most, more
than 1 as far as one process cannot keep a second thread busy. Pipelines are told over their bubble limit and over
`apart` times that limit. The last line is one JSON object; the figures at its top are those of bf16.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing.connection
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from megakor.config.schema import ModelConfig, ParallelConfig, Precision, TrainConfig
from megakor.logs import get_logger
from megakor.train.device import end_process_group, start_process_group
from tests.benchmarks.train_step import rounded
from tests.benchmarks.trainers import Case, MegakorTrainer
from tests.ranks import context, free_port

log = get_logger("megakor.benchmarks.parallel")

NUM_MICRO_BATCHES = 8
BUBBLE_LIMIT = NUM_MICRO_BATCHES / (NUM_MICRO_BATCHES + 1)
CHECKED_STEPS = 2  # the first loss is of the same weights, the second sees the update
LOSS_TOLERANCE = {Precision.fp32: 1e-5, Precision.bf16: 2e-3}  # relative
ONE, APART = "one", "apart"
LAYOUTS = {
    "dp2": ParallelConfig(),
    "tp2": ParallelConfig(tensor_parallel_size=2),
    "tp2_sp": ParallelConfig(tensor_parallel_size=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline_parallel_size=2, pipeline_partition="uniform"),
}
KINDS = {
    "waiting": ("wait: ",),
    "waiting for what was started": ("_Column", "_Sum", "_Scatter"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("aten::_scaled_dot_product",),
    "copies": ("aten::copy_", "aten::cat", "aten::clone"),
    "optimizer": ("aten::_fused_adamw_",),
}
"""Beginnings of the names of operations, by what they are. Tensor-parallel functions only start and wait themselves."""


def case(precision: Precision, batch_size: int = NUM_MICRO_BATCHES) -> Case:
    """The model and the batch, in micro-batches of one sequence."""
    model = ModelConfig(
        hidden_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        intermediate_size=2048,
        vocab_size=6144,
        rotary_pct=0.5,
    )
    train = TrainConfig(
        num_steps=1,
        global_batch_size=batch_size,
        micro_batch_size=1,
        sequence_length=512,
        precision=precision,
    )
    return Case("block", model, train)


@dataclass(frozen=True)
class Turn:
    """A step of a side: loss, wall seconds, and processor seconds of all its ranks."""

    loss: float
    seconds: float
    cpu_seconds: float


class Rank:
    """What a process of a side does when it is told to.

    Args:
        rank: its number within the side.
    """

    def __init__(self, case: Case, layout: ParallelConfig, rank: int) -> None:
        self.trainer = MegakorTrainer(case, layout)
        self.case, self.rank = case, rank
        self.replicas, self.replica = self.trainer.engine.dims.data, self.trainer.engine.data_rank

    def step(self, step: int) -> tuple[float, float]:
        """One optimizer step: the loss, and processor seconds."""
        batches = self.case.batches(step)[self.replica :: self.replicas]
        start = time.process_time()
        loss, _ = self.trainer.step(batches)
        return loss, time.process_time() - start

    def profile(self, step: int) -> str:
        """A step's operations by kind and by name."""
        with waiting_seen(), profile(activities=[ProfilerActivity.CPU]) as profiler:
            start = time.perf_counter()
            self.step(step)
            seconds = time.perf_counter() - start
        events = profiler.key_averages()
        kinds: dict[str, float] = defaultdict(float)
        for event in events:
            found = [kind for kind, names in KINDS.items() if event.key.startswith(names)]
            inside = event.cpu_time_total if found == ["waiting"] else event.self_cpu_time_total
            kinds[found[0] if found else "other operations"] += inside / 1e6
        kinds["Python and the rest"] = seconds - sum(kinds.values())
        shares = ", ".join(f"{kind} {part:.3f} s" for kind, part in sorted(kinds.items(), key=lambda kind: -kind[1]))
        table = events.table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50)
        return f"rank {self.rank}, {seconds:.3f} s: {shares}\n{table}"


@contextmanager
def waiting_seen() -> Iterator[None]:
    """Inside, a profiler sees as `wait: …` what passes in collectives and messages."""
    names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "send", "recv",
             "broadcast", "all_gather", "reduce", "barrier", "batch_isend_irecv")  # fmt: skip
    real = {name: getattr(dist, name) for name in names}

    def seen(name: str, function: Callable) -> Callable:
        @wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            with record_function(f"wait: {name}"):
                return function(*args, **keywords)

        return call

    for name, function in real.items():
        setattr(dist, name, seen(name, function))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def work(
    pipe: multiprocessing.connection.Connection,
    case: Case,
    layout: ParallelConfig | None,
    rank: int,
    size: int,
    port: int,
) -> None:
    """A process's life: answer what comes through the pipe, sleep in between. Without a layout it is on its own."""
    num_threads = 2 // size
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    if layout is not None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    torch.set_num_threads(num_threads)
    if size > 1:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    start_process_group()
    worker = Rank(case, layout or ParallelConfig(), rank)
    pipe.send(None)
    for command, step in iter(pipe.recv, None):
        pipe.send(getattr(worker, command)(step))
    end_process_group()


class Side:
    """The processes of a layout; without one, each is a run of its own."""

    def __init__(self, case: Case, layout: ParallelConfig | None, size: int) -> None:
        server, port = context(), free_port()
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = server.Pipe()
            process = server.Process(target=work, args=(theirs, case, layout, rank, size, port), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def tell(self, command: str, step: int) -> list[Any]:
        """Every rank's answer to a command."""
        for pipe in self.pipes:
            pipe.send((command, step))
        return [pipe.recv() for pipe in self.pipes]

    def turn(self, step: int) -> Turn:
        start = time.perf_counter()
        answers = self.tell("step", step)
        seconds = time.perf_counter() - start
        return Turn(answers[0][0], seconds, sum(cpu_seconds for _, cpu_seconds in answers))

    def end(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join()


def check_agreement(sides: dict[str, Side], precision: Precision) -> float:
    """Make the same first steps on every side; returns the largest relative difference of a loss from one process's.

    Raises:
        ValueError: a loss differs by more than the precision explains.
    """
    losses = {name: [side.turn(step).loss for step in range(CHECKED_STEPS)] for name, side in sides.items()}
    worst = 0.0
    for name, theirs in losses.items():
        difference = max(abs(their / one - 1) for one, their in zip(losses[ONE], theirs, strict=True))
        if not difference <= LOSS_TOLERANCE[precision]:
            raise ValueError(f"{name}: losses {theirs} must be within {LOSS_TOLERANCE[precision]} of {losses[ONE]}")
        worst = max(worst, difference)
    return worst


def measure(precision: Precision, layouts: list[str], rounds: int) -> dict[str, Any]:
    """The figures of a precision."""
    chosen = case(precision)
    sides = {ONE: Side(chosen, ParallelConfig(), 1)} | {name: Side(chosen, LAYOUTS[name], 2) for name in layouts}
    difference = check_agreement(sides, precision)
    sides[APART] = Side(case(precision, NUM_MICRO_BATCHES // 2), None, 2)
    for step in range(CHECKED_STEPS):
        sides[APART].turn(step)
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    names = list(sides)
    for index in range(rounds):
        start = index % len(names)
        for name in names[start:] + names[:start]:  # another begins each round
            turns[name].append(sides[name].turn(CHECKED_STEPS + index))
    for side in sides.values():
        side.end()
    figures: dict[str, Any] = {}
    for name in (APART, *layouts):
        pairs = list(zip(turns[ONE], turns[name], strict=True))
        ratios = [one.seconds / two.seconds for one, two in pairs]
        figures[name] = {
            "ratio": median(ratios),
            "range": [min(ratios), max(ratios)],
            "cpu_ratio": median(one.cpu_seconds / two.cpu_seconds for one, two in pairs),
            "tokens_per_second": chosen.num_tokens / median(two.seconds for _, two in pairs),
        }
        if name.startswith("pp"):
            figures[name]["of_bubble_limit"] = figures[name]["ratio"] / BUBBLE_LIMIT
            figures[name]["of_apart_and_bubble_limit"] = figures[name]["of_bubble_limit"] / figures[APART]["ratio"]
    figures["one_tokens_per_second"] = chosen.num_tokens / median(one.seconds for one in turns[ONE])
    figures["loss_difference"] = difference
    return figures


def show_profile(precision: Precision, layouts: list[str]) -> None:
    """Print where the time of a step goes, on every rank."""
    for name in (ONE, *layouts):
        side = Side(case(precision), LAYOUTS.get(name, ParallelConfig()), 1 if name == ONE else 2)
        for step in range(CHECKED_STEPS):
            side.turn(step)
        for text in side.tell("profile", CHECKED_STEPS):
            print(f"{name}_{precision.value}, {text}", flush=True)
        side.end()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.parallel")
    parser.add_argument("--rounds", type=int, default=4, help="turns that each side takes after the warm-up")
    parser.add_argument("--precision", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes instead")
    arguments = parser.parse_args()
    results = {}
    for precision in map(Precision, arguments.precision):
        if arguments.profile:
            show_profile(precision, arguments.layout)
            continue
        start = time.perf_counter()
        results[precision.value] = result = measure(precision, arguments.layout, arguments.rounds)
        ratios = ", ".join(f"{name} {result[name]['ratio']:.3f}" for name in (APART, *arguments.layout))
        log.info("%s: %s (%.0f s)", precision.value, ratios, time.perf_counter() - start)
    if not results:
        return
    headline = next(iter(results.values()))
    summary = {name: headline[name]["ratio"] for name in arguments.layout}
    if "pp2" in summary:
        summary["pp2_of_bubble_limit"] = headline["pp2"]["of_bubble_limit"]
    print(json.dumps(rounded(summary | {"rounds": arguments.rounds, "cases": results})), flush=True)


if __name__ == "__main__":
    main()
