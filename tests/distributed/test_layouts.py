"""Whole runs in several layouts: losses, gradient norms, validation and saved weights agree.

Every layout's curve is compared in `test_matrix.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from megakor.checkpoint.reader import load_model, read_weights, resolve
from megakor.data.heldout import HeldoutSet
from megakor.model.loss import token_losses
from tests.distributed.runs import (
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
from tests.distributed.tiny import ROUNDING

UNCLIPPED = {"train__clip_grad_norm": 0.0}
ONE_RANK = {
    "dp1": {},
    "dp1 tied": TIED,
    "dp1 bf16": BF16,
    "dp1 tied bf16": TIED | BF16,
    "dp1 unclipped": UNCLIPPED,
}
TWO_RANKS = {
    "dp2": {},
    "dp2 saving": {"checkpoint__interval": 2, "evaluation__interval": 1},
    "dp2 zero0": zero(0),
    "dp2 zero2": zero(2),
    "dp2 unclipped": UNCLIPPED,
    "pp2": PP2,
    "pp2 tied": PP2 | TIED,
    "pp2 tied bf16": PP2 | TIED | BF16,
    "pp2 unclipped": PP2 | UNCLIPPED,
}
FOUR_RANKS = {
    "pp2 dp2 tied": PP2 | TIED,
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
    "dp1": ["dp2", "dp2 zero0", "dp2 zero2", "pp2"],
    "dp1 tied": ["pp2 tied", "pp2 dp2 tied"],
    "dp1 unclipped": ["dp2 unclipped", "pp2 unclipped"],
}
"""Layouts by the reference that they must equal."""


@pytest.mark.parametrize(("reference", "name"), [(first, name) for first, names in FP32.items() for name in names])
def test_layouts_agree(folder: Layouts, reference: str, name: str) -> None:
    expected, found = curve(folder / reference), curve(folder / name)
    assert len(found) == 12
    assert far(expected, found) < 1e-5
    assert far(validation(folder / reference), validation(folder / name)) < 1e-5


@pytest.mark.parametrize("name", ["pp2 tied bf16", "pp2 dp2 tied bf16"])
def test_tied_embeddings_agree_in_bf16(folder: Layouts, name: str) -> None:
    """The bounds are those of the matrix: twice what rounding does to one process."""
    found, expected, fp32 = (curve(folder / which) for which in (name, "dp1 tied bf16", "dp1 tied"))
    loss, norm = (2 * bound for bound in ROUNDING)
    assert far(expected, found, columns=[0, 1]) < loss
    assert far(expected, found, columns=[2]) < norm
    assert 0 < far(fp32, found, columns=[1]) < 2 * loss


def test_the_comparisons_would_show_a_difference(folder: Layouts) -> None:
    for first, second in (("dp1", "dp1 tied"), ("dp1", "dp1 unclipped"), ("dp1", "dp1 bf16")):
        assert far(curve(folder / first), curve(folder / second)) > 1e-4, (first, second)
    assert curve(folder / "dp1")[-1][1] < curve(folder / "dp1")[0][1] - 0.3  # it learns
    assert any(row[2] > 1.0 for row in curve(folder / "dp1"))  # something is clipped


def test_saving_and_evaluating_change_nothing(folder: Layouts) -> None:
    assert curve(folder / "dp2") == curve(folder / "dp2 saving")
    assert len(list((folder / "dp2 saving" / "checkpoints").glob("step-*"))) == 6


@pytest.mark.parametrize("name", ["dp1", "dp2 zero2", "pp2", "pp2 tied", "pp2 dp2 tied"])
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
