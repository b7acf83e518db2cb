"""Golden curves: the digits of losses and gradient norms, which a refactor may not change.

    python -m tests.distributed.golden

trains the runs below and writes golden.json anew: when a change of the digits is meant, with the reason in the commit.
Where torch, DeepSpeed and the processor are those that wrote the file, the digits must be the same. Elsewhere other
kernels add in another order, and the curves must agree as closely as rounding lets them.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import deepspeed
import torch

from tests.distributed.tiny import Curve, Layout, curves

FILE = Path(__file__).with_name("golden.json")
NUM_STEPS = 10

RUNS = {
    "one process": Layout(micro_batch=4),
    "one process, dropout": Layout(micro_batch=4, variant="dropout"),
    "one process, bf16": Layout(micro_batch=4, precision="bf16"),
    "TP 2, sequence parallel": Layout(2, tensor=2, sequence_parallel=True, micro_batch=4),
    "PP 2": Layout(2, pipeline=2, micro_batch=2, num_layers=4),
    "CP 2": Layout(2, context=2, micro_batch=4),
    "DP 2, ZeRO-2": Layout(2, zero=2, micro_batch=2),
    "DP 2, ZeRO-3": Layout(2, zero=3, micro_batch=2),
}


def machine() -> dict[str, str]:
    """What the digits depend on besides the code."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": names[0] if names else platform.processor(),
    }


def golden_curves() -> dict[str, Curve]:
    """The curve of each run, on its first rank."""
    found = curves(RUNS.values(), NUM_STEPS)
    return {name: found[layout][0] for name, layout in RUNS.items()}


def main() -> None:
    lines = [f"  {json.dumps(name)}: {json.dumps(curve)}" for name, curve in golden_curves().items()]
    text = f'{{\n "machine": {json.dumps(machine())},\n "curves": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    FILE.write_text(text, encoding="utf-8")
    print(f"{len(RUNS)} curves in {FILE}", file=sys.stderr)


if __name__ == "__main__":
    main()
