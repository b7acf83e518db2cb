"""Every layout trains the same model: losses, gradient norms and validation agree in fp32."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megakor.checkpoint.reader import load_model, read_weights, resolve
from megakor.data.stream import HeldoutSet
from megakor.model.loss import masked_loss
from tests.distributed.runs import (
    ADAFACTOR,
    BF16,
    PP2,
    TIED,
    Job,
    Made,
    configuration,
    curve,
    run_all,
    validation,
    zero,
)

ONE_RANK = {
    "dp1": {},
    "dp1 micro 8": {"train__micro_batch_size": 8},
    "dp1 zero0": zero(0),
    "dp1 zero2": zero(2),
    "dp1 tied": TIED,
    "dp1 adafactor": ADAFACTOR,
    "dp1 adafactor zero0": ADAFACTOR | zero(0),
    "dp1 bf16": BF16,
    "dp1 unclipped": {"train__clip_grad_norm": 0.0},
}
TWO_RANKS = {
    "dp2": {},
    "dp2 saving": {"checkpoint__interval": 2, "evaluation__interval": 1},
    "dp2 zero0": zero(0),
    "dp2 zero2": zero(2),
    "dp2 tied": TIED,
    "dp2 adafactor": ADAFACTOR,
    "dp2 adafactor zero0": ADAFACTOR | zero(0),
    "dp2 adafactor zero2": ADAFACTOR | zero(2),
    "dp2 bf16": BF16,
    "dp2 unclipped": {"train__clip_grad_norm": 0.0},
    "pp2": PP2,
    "pp2 uniform": PP2 | {"parallel__pipeline_partition": "uniform"},
    "pp2 tied": PP2 | TIED,
    "pp2 adafactor": PP2 | ADAFACTOR,
    "pp2 tied adafactor": PP2 | TIED | ADAFACTOR,
    "pp2 bf16": PP2 | BF16,
    "pp2 unclipped": PP2 | {"train__clip_grad_norm": 0.0},
}
ONE_RANK["dp1 tied adafactor"] = TIED | ADAFACTOR


@pytest.fixture(scope="module")
def folder(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    for world_size, layouts in ((1, ONE_RANK), (2, TWO_RANKS)):
        jobs = [Job(configuration(made, folder / name, **changes)) for name, changes in layouts.items()]
        assert [error for error, _ in run_all(world_size, jobs)] == [None] * len(jobs)
    return folder


def far(first: list[tuple[int, float, float]], second: list[tuple[int, float, float]]) -> float:
    """The largest relative difference between two curves."""
    assert [row[0] for row in first] == [row[0] for row in second] and len(first) > 1
    return max(
        abs(a - b) / max(abs(a), abs(b)) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        *[("dp1", name) for name in ("dp1 micro 8", "dp1 zero0", "dp1 zero2", "dp2", "dp2 zero0", "dp2 zero2", "pp2", "pp2 uniform")],
        ("dp1 tied", "dp2 tied"), ("dp1 tied", "pp2 tied"),
        *[("dp1 adafactor", name) for name in ("dp1 adafactor zero0", "dp2 adafactor", "dp2 adafactor zero0", "dp2 adafactor zero2", "pp2 adafactor")],
        ("dp1 tied adafactor", "pp2 tied adafactor"),
        ("dp1 unclipped", "dp2 unclipped"), ("dp1 unclipped", "pp2 unclipped"),
    ],
)  # fmt: skip
def test_layouts_agree(folder: Path, reference: str, name: str) -> None:
    assert len(curve(folder / name)) == 12
    assert far(curve(folder / reference), curve(folder / name)) < 1e-5
    assert far(validation(folder / reference), validation(folder / name)) < 1e-5


@pytest.mark.parametrize("name", ["dp2 bf16", "pp2 bf16"])
def test_layouts_agree_in_bf16(folder: Path, name: str) -> None:
    """bf16 has 8 bits: sums in another order differ by about 2^-8 of a gradient, of a loss much less."""
    losses = [row[1] for row in curve(folder / name)]
    expected = [row[1] for row in curve(folder / "dp1 bf16")]
    assert losses == pytest.approx(expected, rel=2e-3)
    fp32 = [row[1] for row in curve(folder / "dp1")]
    assert losses == pytest.approx(fp32, rel=1e-2)
    assert losses != fp32


def test_the_comparisons_would_show_a_difference(folder: Path) -> None:
    for first, second in (("dp1", "dp1 tied"), ("dp1", "dp1 adafactor"), ("dp1", "dp1 unclipped"), ("dp1", "dp1 bf16")):
        assert far(curve(folder / first), curve(folder / second)) > 1e-4, (first, second)
    assert curve(folder / "dp1")[-1][1] < curve(folder / "dp1")[0][1] - 0.3  # it learns
    assert any(row[2] > 1.0 for row in curve(folder / "dp1"))  # something is clipped


def test_saving_and_evaluating_change_nothing(folder: Path) -> None:
    assert curve(folder / "dp2") == curve(folder / "dp2 saving")
    assert len(list((folder / "dp2 saving" / "checkpoints").glob("step-*"))) == 6


@pytest.mark.parametrize("name", ["dp1", "dp2 zero2", "pp2", "pp2 tied", "dp2 adafactor"])
def test_validation_is_that_of_the_saved_model(folder: Path, made: Made, name: str) -> None:
    """Each held-out token once, by the plain model; in bits per byte of the text."""
    model, manifest = load_model(resolve(folder / name))
    held = HeldoutSet("held", made.heldout, 32)
    total = 0.0
    with torch.no_grad():
        for row in range(held.num_windows):
            batch = held.windows(row, 1)
            logits = model(torch.from_numpy(batch.input_ids))
            mask = torch.from_numpy(batch.loss_mask)
            total += masked_loss(
                logits, torch.from_numpy(batch.labels), mask, torch.tensor(1.0), manifest.num_tokens
            ).item()
    step, loss, bits = validation(folder / name)[-1]
    assert step == 12
    assert loss == pytest.approx(total / held.num_tokens, rel=1e-5)
    assert bits == pytest.approx(total / held.num_text_bytes / math.log(2), rel=1e-5)
    assert held.num_windows % 4  # the last round has rows past the end


@pytest.mark.parametrize(
    ("reference", "name"),
    [("dp1", "dp2"), ("dp1", "pp2"), ("dp1 tied", "pp2 tied"), ("dp1 adafactor", "dp2 adafactor zero2")],
)
def test_the_weights_agree(folder: Path, reference: str, name: str) -> None:
    first, second = read_weights(resolve(folder / reference)), read_weights(resolve(folder / name))
    assert first.keys() == second.keys()
    for key in first:
        if key.endswith("query_key_value.bias"):
            continue  # the keys' share of it has no effect on the loss: its gradient is rounding, which Adam enlarges
        torch.testing.assert_close(
            first[key], second[key], rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
