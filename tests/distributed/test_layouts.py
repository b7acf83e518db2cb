"""Every layout trains the same model: losses, gradient norms and validation agree in fp32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megakor.checkpoint.reader import load_model, read_weights, resolve
from megakor.data.stream import HeldoutSet
from megakor.model.loss import token_losses
from tests.distributed.runs import (
    ADAFACTOR,
    BF16,
    PP2,
    TIED,
    Curve,
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
    "dp1 tied adafactor": TIED | ADAFACTOR,
    "dp1 tied bf16": TIED | BF16,
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
    "pp2 tied bf16": PP2 | TIED | BF16,
    "pp2 unclipped": PP2 | {"train__clip_grad_norm": 0.0},
}
FOUR_RANKS = {
    "pp2 dp2": PP2,
    "pp2 dp2 tied": PP2 | TIED,
    "pp2 dp2 adafactor": PP2 | ADAFACTOR,
    "pp2 dp2 tied bf16": PP2 | TIED | BF16,
}


class Layouts:
    """The folder of every layout's run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.errors: dict[str, str | None] = {}

    def __truediv__(self, name: str) -> Path:
        assert self.errors[name] is None, f"{name}: {self.errors[name]}"
        return self.folder / name


@pytest.fixture(scope="module")
def folder(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    found = Layouts(tmp_path_factory.mktemp("layouts"))
    for world_size, layouts in ((1, ONE_RANK), (2, TWO_RANKS), (4, FOUR_RANKS)):
        jobs = [Job(configuration(made, found.folder / name, **changes)) for name, changes in layouts.items()]
        found.errors |= {name: error for name, (error, _) in zip(layouts, run_all(world_size, jobs), strict=True)}
    return found


def far(first: Curve, second: Curve, columns: Sequence[int] = (0, 1, 2)) -> float:
    """The largest relative difference between columns of two curves."""
    assert [row[0] for row in first] == [row[0] for row in second]
    assert len(first) > 1
    pairs = [(one[c], other[c]) for one, other in zip(first, second, strict=True) for c in columns]
    return max(abs(one - other) / max(abs(one), abs(other)) for one, other in pairs)


FP32 = {
    "dp1": ["dp1 micro 8", "dp1 zero0", "dp1 zero2", "dp2", "dp2 zero0", "dp2 zero2", "pp2", "pp2 uniform", "pp2 dp2"],
    "dp1 tied": ["dp2 tied", "pp2 tied", "pp2 dp2 tied"],
    "dp1 adafactor": ["dp1 adafactor zero0", "dp2 adafactor", "dp2 adafactor zero0", "dp2 adafactor zero2",
                      "pp2 adafactor", "pp2 dp2 adafactor"],
    "dp1 tied adafactor": ["pp2 tied adafactor"],
    "dp1 unclipped": ["dp2 unclipped", "pp2 unclipped"],
}  # fmt: skip
"""Layouts by the reference that they must equal."""


@pytest.mark.parametrize(("reference", "name"), [(first, name) for first, names in FP32.items() for name in names])
def test_layouts_agree(folder: Layouts, reference: str, name: str) -> None:
    expected, found = curve(folder / reference), curve(folder / name)
    assert len(found) == 12
    assert far(expected, found, columns=[0, 1]) < 1e-5
    # Where a gradient is rounding alone, as of most key biases, Adafactor's first update is ± the rate: the norms that
    # follow show it, the losses do not. `tests/train/test_adafactor.py` has the updates themselves equal.
    assert far(expected, found, columns=[2]) < (3e-4 if "adafactor" in name else 1e-5)
    assert far(validation(folder / reference), validation(folder / name)) < 1e-5


@pytest.mark.parametrize(
    ("reference", "name"),
    [("dp1", "dp2 bf16"), ("dp1", "pp2 bf16"), ("dp1 tied", "pp2 tied bf16"), ("dp1 tied", "pp2 dp2 tied bf16")],
)
def test_layouts_agree_in_bf16(folder: Layouts, reference: str, name: str) -> None:
    """bf16 has 8 significant bits: another order of summation changes a gradient by about 2^-8, a loss by less."""
    losses = [row[1] for row in curve(folder / name)]
    norms = [row[2] for row in curve(folder / name)]
    expected = curve(folder / f"{reference} bf16")
    assert losses == pytest.approx([row[1] for row in expected], rel=3e-4)
    assert norms == pytest.approx([row[2] for row in expected], rel=5e-3)
    fp32 = [row[1] for row in curve(folder / reference)]
    assert losses == pytest.approx(fp32, rel=1e-3)
    assert losses != fp32


def test_the_comparisons_would_show_a_difference(folder: Layouts) -> None:
    for first, second in (("dp1", "dp1 tied"), ("dp1", "dp1 unclipped"), ("dp1", "dp1 bf16")):
        assert far(curve(folder / first), curve(folder / second)) > 1e-4, (first, second)
    assert curve(folder / "dp1")[-1][1] < curve(folder / "dp1")[0][1] - 0.3  # it learns
    assert any(row[2] > 1.0 for row in curve(folder / "dp1"))  # something is clipped


def test_saving_and_evaluating_change_nothing(folder: Layouts) -> None:
    assert curve(folder / "dp2") == curve(folder / "dp2 saving")
    assert len(list((folder / "dp2 saving" / "checkpoints").glob("step-*"))) == 6


@pytest.mark.parametrize("name", ["dp1", "dp2 zero2", "pp2", "pp2 tied", "dp2 adafactor", "pp2 dp2 tied"])
def test_validation_is_that_of_the_saved_model(folder: Layouts, made: Made, name: str) -> None:
    """Each held-out token once, by the plain model; in bits per byte of the text."""
    model, manifest = load_model(resolve(folder / name))
    held = HeldoutSet("held", made.heldout, 32)
    total = 0.0
    with torch.no_grad():
        for row in range(held.num_windows):
            batch = held.windows(row, 1)
            ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
            losses = token_losses(model(ids), labels, manifest.num_tokens) * torch.from_numpy(batch.loss_mask)
            total += losses.sum().item()
    step, loss, bits = validation(folder / name)[-1]
    assert step == 12
    assert loss == pytest.approx(total / held.num_tokens, rel=1e-5)
    assert bits == pytest.approx(total / held.num_text_bytes / math.log(2), rel=1e-5)
    assert held.num_windows % 4  # the last round has rows past the end


@pytest.mark.parametrize(
    ("reference", "name"), [("dp1", "dp2"), ("dp1", "pp2"), ("dp1", "dp2 zero2"), ("dp1 tied", "pp2 tied")]
)
def test_the_weights_agree(folder: Layouts, reference: str, name: str) -> None:
    first, second = read_weights(resolve(folder / reference)), read_weights(resolve(folder / name))
    assert first.keys() == second.keys()
    for key in first:
        if key.endswith("query_key_value.bias"):
            continue  # the keys' share of it has hardly a gradient but rounding, which Adam enlarges
        torch.testing.assert_close(first[key], second[key], rtol=1e-3, atol=2e-5)
