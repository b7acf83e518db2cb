"""What the plots show of a run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megakor.report.collect import collect
from megakor.report.figures import MAX_POINTS, figures


def test_a_run_has_a_plot_of_everything_it_measured(demo_once: Path) -> None:
    pretrain, instruct = collect(demo_once).runs
    plots = figures(pretrain, {"unigram": 2.2, "order 0": 4.4})
    assert list(plots) == [f"pretrain-{key}" for key in ("loss", "bits", "lr", "norm", "speed", "mfu")]
    assert [trace.name for trace in plots["pretrain-loss"].data] == ["training", "heldout", "checkpoint"]
    assert [trace.name for trace in plots["pretrain-bits"].data] == ["training", "heldout", "unigram", "order 0"]
    assert list(plots["pretrain-bits"].data[3].y) == [4.4, 4.4]
    assert [trace.name for trace in figures(instruct, {})["instruct-bits"].data] == ["heldout"]


def test_training_bits_per_byte_are_the_loss_over_the_bytes_of_a_token(demo_once: Path) -> None:
    run = collect(demo_once).runs[0]
    assert run.tokens_per_byte is not None
    expected = run.steps[-1]["loss"] / math.log(2) * run.tokens_per_byte
    assert figures(run, {})["pretrain-bits"].data[0].y[-1] == pytest.approx(expected, rel=1e-5)


def test_a_resume_is_marked_with_the_steps_done_twice(demo_once: Path) -> None:
    for plot in figures(collect(demo_once).runs[0], {}).values():
        assert [(shape.type, shape.x0, shape.x1) for shape in plot.layout.shapes] == [
            ("line", 30, 30),
            ("rect", 30, 45),
        ]


def test_what_was_not_measured_has_no_plot(bare_run: Path) -> None:
    run = collect(bare_run).runs[0]
    steps = [{"step": record["step"], "loss": record["loss"]} for record in run.steps]
    plots = figures(replace(run, steps=steps, validation={}, checkpoints=[]), {})
    assert list(plots) == ["pretrain-loss"]


def test_numbers_that_are_not_finite_are_gaps(bare_run: Path) -> None:
    run = collect(bare_run).runs[0]
    steps = [{**record, "loss": math.nan if record["step"] == 3 else record["loss"]} for record in run.steps]
    losses = figures(replace(run, steps=steps), {})["pretrain-loss"].data[0].y
    assert [index for index, loss in enumerate(losses) if loss is None] == [2]


def test_long_curves_are_thinned_and_keep_the_spikes_of_the_gradient_norm(bare_run: Path) -> None:
    run = collect(bare_run).runs[0]
    steps = [{"step": step, "loss": 1.0, "grad_norm": 99.0 if step == 7777 else 0.5} for step in range(1, 100_001)]
    plots = figures(replace(run, steps=steps), {})
    norms = plots["pretrain-norm"].data[0]
    assert len(norms.x) <= MAX_POINTS
    assert norms.x[-1] == 100_000
    assert max(norms.y) == 99.0
