"""How the plan's constants were found: published rows go in, the shares of the data sheets that fit them best come out.

    python -m tests.plan.fit

Four constants are fitted, on the rows that are marked so and no others: of products on A100s and on H100s, of
attention and of memory. What is minimal is the mean of |log(predicted / published)|; one constant is moved at a time,
by smaller and smaller steps, until none gets better. The results, rounded, stand in `megakor.plan.hardware` and in the
files of the H100 and the H200.
"""

from __future__ import annotations

import math
from dataclasses import replace

from megakor.plan.hardware import Hardware, find_hardware
from tests.plan.published import Row, rows

START = {"a100": 0.7, "h100": 0.7, "attention": 0.5, "memory": 0.7}
FIRST_STEP, LAST_STEP = 0.1, 0.005


def in_use() -> dict[str, float]:
    """The constants as they stand."""
    a100, h100 = find_hardware("a100-80g"), find_hardware("h100")
    return {
        "a100": a100.matmul_efficiency,
        "h100": h100.matmul_efficiency,
        "attention": a100.attention_efficiency,
        "memory": a100.memory_efficiency,
    }


def hardware_of(row: Row, shares: dict[str, float]) -> Hardware:
    """A row's hardware, with other shares."""
    return replace(
        find_hardware(row.hardware),
        matmul_efficiency=shares["h100" if row.hardware == "h100" else "a100"],
        attention_efficiency=shares["attention"],
        memory_efficiency=shares["memory"],
    )


def error(chosen: list[Row], shares: dict[str, float]) -> float:
    """Mean of the absolute logarithm of predicted over published."""
    return sum(abs(math.log(row.predicted(hardware_of(row, shares)) / row.published)) for row in chosen) / len(chosen)


def fit(chosen: list[Row]) -> tuple[dict[str, float], float]:
    """The shares that fit best, and their error."""
    shares, step = dict(START), FIRST_STEP
    least = error(chosen, shares)
    while step >= LAST_STEP:
        before = least
        for name in shares:
            for moved in (shares[name] - step, shares[name] + step):
                if 0 < moved <= 1 and (found := error(chosen, {**shares, name: moved})) < least:
                    shares, least = {**shares, name: moved}, found
        if least == before:
            step /= 2
    return shares, least


def main() -> None:
    shares, least = fit([row for row in rows() if row.fitted])
    for name, share in shares.items():
        print(f"{name:10} {share:.3f}")
    print(f"error      {100 * least:.1f} %")


if __name__ == "__main__":
    main()
