"""Training speed: megakor's engine against `transformers` and plain PyTorch, on the same shapes and data.

    python -m tests.benchmarks.train_step [--rounds 7] [--case block_bf16 …] [--profile]

For each case both sides first make the same steps from the same weights, and their losses must agree. Then they take
turns (matmuls, megakor, transformers, matmuls, megakor, …), so that a busy machine slows all of them alike; figures are
medians over the rounds. `cpu_seconds_ratio` compares the processor time of the same steps: with one thread it does not
see what else the machine does. In bf16 `transformers` gets the faster of autocast and bf16 weights with fp32 masters.
Neither side is compiled. The last line is one JSON object; its ratio and fraction at the top are those of `block_bf16`.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from megakor.config.compose import config_folder
from megakor.config.schema import ModelConfig, Precision, TrainConfig
from megakor.logs import get_logger
from megakor.model.flops import train_flops_per_token
from megakor.train.device import DTYPES, end_process_group, start_process_group
from tests.benchmarks.trainers import Case, MasterWeightsTrainer, MegakorTrainer, Trainer, TransformersTrainer

log = get_logger("megakor.benchmarks.train_step")

HEADLINE = "block_bf16"
CHECKED_STEPS = 2  # both the losses of the same weights and the update agree; they are the warm-up as well
LOSS_TOLERANCE = {Precision.fp32: 1e-4, Precision.bf16: 2e-2}
TRIALS = 3  # turns in which transformers' way of bf16 is chosen
DEMO_VOCABULARY = 2048
MATMUL_SECONDS = 0.15  # of each matmul, each round


def cases() -> list[Case]:
    """A few layers of a width where matmuls dominate, and the demo's shape; each in bf16 and fp32."""
    block = ModelConfig(
        hidden_size=768,
        num_hidden_layers=4,
        num_attention_heads=12,
        intermediate_size=3072,
        vocab_size=8192,
        rotary_pct=0.5,
    )
    shipped: Any = OmegaConf.load(config_folder() / "experiment" / "demo.yaml")
    demo = ModelConfig(vocab_size=DEMO_VOCABULARY, **shipped.model)
    sizes = {key: shipped.train[key] for key in ("global_batch_size", "micro_batch_size", "sequence_length")}
    found = []
    for precision in (Precision.bf16, Precision.fp32):
        train = TrainConfig(
            num_steps=1, global_batch_size=4, micro_batch_size=2, sequence_length=512, precision=precision
        )
        found.append(Case("block", block, train))
        found.append(Case("demo", demo, TrainConfig(num_steps=1, precision=precision, **sizes)))
    return found


def check_agreement(case: Case, sides: list[Trainer]) -> float:
    """Make the same first steps on every side; returns the largest difference of a loss from the first side's.

    Raises:
        ValueError: a loss differs by more than the precision explains.
    """
    losses = [[side.step(case.batches(step))[0] for step in range(CHECKED_STEPS)] for side in sides]
    worst = 0.0
    for side, theirs in zip(sides, losses, strict=True):
        difference = max(abs(ours - their) for ours, their in zip(losses[0], theirs, strict=True))
        worst = max(worst, difference)
        if not difference <= LOSS_TOLERANCE[case.train.precision]:
            raise ValueError(
                f"{case.key}: losses {theirs} of {side.description} must be within "
                f"{LOSS_TOLERANCE[case.train.precision]} of {losses[0]}, those of {sides[0].description}"
            )
    return worst


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor time of a call."""
    start, cpu_start = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - cpu_start


def matmuls(case: Case) -> dict[str, tuple[float, Callable[[], torch.Tensor]]]:
    """What the matmul peak is measured on: (floating-point operations, the product) by name."""
    dtype, hidden, inner = DTYPES[case.train.precision], case.model.hidden_size, case.model.intermediate_size
    rows = case.train.micro_batch_size * case.train.sequence_length
    found: dict[str, tuple[float, Callable[[], torch.Tensor]]] = {}
    for name, (m, k, n) in {"square": (1024, 1024, 1024), "feed_forward": (rows, hidden, inner)}.items():
        left, right = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
        found[name] = (2.0 * m * k * n, partial(functional.linear, left, right))
    return found


def matmul_rate(operations: float, product: Callable[[], torch.Tensor]) -> float:
    """FLOP/s of a product, repeated for a while."""
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < MATMUL_SECONDS:
        product()
        count += 1
    return count * operations / elapsed


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """The figures of a case."""
    megakor, theirs = MegakorTrainer(case), [TransformersTrainer(case)]
    if case.train.precision is Precision.bf16:
        theirs.append(MasterWeightsTrainer(case))
    difference = check_agreement(case, [megakor, *theirs])
    batches = case.batches(CHECKED_STEPS)
    turns = range(TRIALS if len(theirs) > 1 else 1)
    trials = [[seconds(partial(side.step, batches))[0] for side in theirs] for _ in turns]
    trial_seconds = {side.description: min(turn[index] for turn in trials) for index, side in enumerate(theirs)}
    reference: Trainer = min(theirs, key=lambda side: trial_seconds[side.description])
    del theirs
    gc.collect()
    products = matmuls(case)
    rates: dict[str, list[float]] = {name: [] for name in products}
    ours_seconds, their_seconds = [], []
    for _ in range(rounds):
        for name, product in products.items():
            rates[name].append(matmul_rate(*product))
        ours_seconds.append(seconds(partial(megakor.step, batches)))
        their_seconds.append(seconds(partial(reference.step, batches)))
    flops = train_flops_per_token(case.model, case.train.sequence_length) * case.num_tokens
    peak_name = max(rates, key=lambda name: median(rates[name]))
    ratios = [their[0] / ours[0] for ours, their in zip(ours_seconds, their_seconds, strict=True)]
    cpu_ratios = [their[1] / ours[1] for ours, their in zip(ours_seconds, their_seconds, strict=True)]
    fractions = [flops / ours[0] / rate for ours, rate in zip(ours_seconds, rates[peak_name], strict=True)]
    figures = {
        "ratio_vs_transformers": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "cpu_seconds_ratio": median(cpu_ratios),
        "fraction_of_matmul_peak": median(fractions),
        "tokens_per_second": case.num_tokens / median(wall for wall, _ in ours_seconds),
        "transformers_tokens_per_second": case.num_tokens / median(wall for wall, _ in their_seconds),
        "matmul_peak_tflops": median(rates[peak_name]) / 1e12,
        "matmul_peak_of": peak_name,
        "transformers": reference.description,
        "transformers_trials_seconds": trial_seconds,
        "loss_difference": difference,
    }
    megakor.engine.engine.destroy()
    return figures


def show_profile(case: Case) -> None:
    """Print where the time of a step goes, for both sides."""
    kind = MasterWeightsTrainer if case.train.precision is Precision.bf16 else TransformersTrainer
    for side in (MegakorTrainer(case), kind(case)):
        batches = case.batches(0)
        for _ in range(3):
            side.step(batches)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(2):
                side.step(batches)
        print(f"{case.key}: {side.description}, 2 steps")
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=35, max_name_column_width=60))


def rounded(value: Any) -> Any:
    """Floats to four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    known = {case.key: case for case in cases()}
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.train_step")
    parser.add_argument("--rounds", type=int, default=7, help="turns that each side takes after the warm-up")
    parser.add_argument("--case", nargs="+", choices=known, default=list(known), help="cases to run")
    parser.add_argument("--profile", action="store_true", help="print where a step's time goes instead")
    arguments = parser.parse_args()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    start_process_group()
    chosen = [known[key] for key in arguments.case]
    if arguments.profile:
        for case in chosen:
            show_profile(case)
        return end_process_group()
    results = {}
    for case in chosen:
        start = time.perf_counter()
        results[case.key] = result = measure(case, arguments.rounds)
        log.info(
            "%s: %.0f tokens/s, %.3f × %s; %.1f %% of the matmul peak, %.3f TFLOP/s (%.0f s)",
            case.key, result["tokens_per_second"], result["ratio_vs_transformers"], result["transformers"],
            100 * result["fraction_of_matmul_peak"], result["matmul_peak_tflops"], time.perf_counter() - start,
        )  # fmt: skip
    end_process_group()
    headline = results.get(HEADLINE) or next(iter(results.values()))
    summary = {
        "ratio_vs_transformers": headline["ratio_vs_transformers"],
        "fraction_of_matmul_peak": headline["fraction_of_matmul_peak"],
        "num_threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "cases": results,
    }
    print(json.dumps(rounded(summary)), flush=True)


if __name__ == "__main__":
    main()
