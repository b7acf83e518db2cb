"""The plots: a training run in; Plotly figures out, by the id of the element that they are drawn in.

Colours are named, not given: a trace's `meta` is the name of a CSS variable of the page, so that a plot follows the
reader's light or dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go

from megakor.report.collect import Record, TrainingRun

MAX_POINTS = 2000  # of one curve; longer ones are thinned by groups of neighbouring steps
MAX_NAMED_RESUMES = 4
COLOURS = ("orange", "green", "purple", "red")  # of held-out sets; training is blue

Summary = Callable[[Sequence[float]], float]
Points = tuple[list[float], list[float | None]]


def figures(run: TrainingRun, references: dict[str, float]) -> dict[str, go.Figure]:
    """The plots of a run; those that it has no numbers for are left out.

    Args:
        run: what was gathered.
        references: bits per byte of simple models on the held-out text, by name.
    """
    loss = _frame("loss", "nats per token", main=True)
    _curve(loss, "training", _points(run.steps, "loss"), "blue")
    bits = _frame("bits per byte", "bits per byte", main=True)
    if run.tokens_per_byte:
        factor = run.tokens_per_byte / math.log(2)
        _curve(bits, "training", _points(run.steps, "loss", factor=factor), "blue")
    for index, (name, records) in enumerate(run.validation.items()):
        colour = COLOURS[index % len(COLOURS)]
        _curve(loss, name, _points(records, "loss"), colour, markers=True)
        _curve(bits, name, _points(records, "bits_per_byte"), colour, markers=True)
    plots = {"loss": loss}
    if run.validation:
        _references(bits, references, [record["step"] for record in run.steps])
        plots["bits"] = bits
    singles: dict[str, tuple[str, str, str, Summary, str]] = {
        "lr": ("learning rate", "lr", "", _mean, "~g"),
        "norm": ("gradient norm", "grad_norm", "before clipping", max, "~g"),
        "speed": ("throughput", "tokens_per_second", "tokens / s", _mean, "~s"),
        "mfu": ("model FLOPs utilisation", "mfu", "of the matmul peak", _mean, ".1~%"),
    }
    for key, (title, field, unit, summarise, tick_format) in singles.items():
        points = _points(run.steps, field, summarise)
        if any(value is not None for value in points[1]):
            plots[key] = _frame(title, unit)
            plots[key].update_yaxes(tickformat=tick_format, rangemode="tozero")
            _curve(plots[key], title, points, "blue")
    for key, plot in plots.items():
        _mark_resumes(plot, run, named=key == "loss")
    _mark_checkpoints(loss, run)
    return {f"{run.key}-{key}": plot for key, plot in plots.items() if plot.data}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _points(records: Sequence[Record], field: str, summarise: Summary = _mean, factor: float = 1) -> Points:
    """(steps, values) of a field. Values that are not finite are gaps; long curves are summarised in equal groups."""
    values = [(record["step"], record.get(field)) for record in records]
    group = math.ceil(len(values) / MAX_POINTS) or 1
    steps: list[float] = []
    result: list[float | None] = []
    for start in range(0, len(values), group):
        part = values[start : start + group]
        finite = [value for _, value in part if isinstance(value, int | float) and math.isfinite(value)]
        steps.append(part[-1][0])
        result.append(float(f"{factor * summarise(finite):.6g}") if finite else None)
    return steps, result


def _frame(title: str, unit: str, main: bool = False) -> go.Figure:
    axis: dict[str, Any] = {"zeroline": False, "automargin": True, "ticks": "", "nticks": 7 if main else 5}
    return go.Figure(
        layout={
            "template": "none",
            "height": 360 if main else 240,
            "margin": {"l": 8, "r": 8, "t": 34 if main else 10, "b": 8},
            "hovermode": "x unified",
            "showlegend": main,
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
            "xaxis": {
                **axis,
                "tickformat": ",d",
                "rangemode": "tozero",
                "title": {"text": "step", "standoff": 4},
                "showgrid": False,
            },
            "yaxis": {**axis, "title": {"text": unit}},
            "meta": title,
        }
    )


def _curve(figure: go.Figure, name: str, points: Points, colour: str, markers: bool = False) -> None:
    steps, values = points
    if all(value is None for value in values):
        return
    few = len(steps) <= 60 if markers else len(steps) == 1
    figure.add_scatter(
        x=steps, y=values, name=name, meta=colour, mode="lines+markers" if few else "lines",
        line={"width": 1.8}, marker={"size": 6}, hovertemplate="%{y:.4~g}",
    )  # fmt: skip


def _references(figure: go.Figure, references: dict[str, float], steps: Sequence[int]) -> None:
    for (name, value), dash in zip(references.items(), ("dash", "dot"), strict=False):
        figure.add_scatter(
            x=[steps[0], steps[-1]], y=[value, value], name=name, meta="muted", mode="lines",
            line={"width": 1.4, "dash": dash}, hovertemplate="%{y:.4~g}",
        )  # fmt: skip


def _mark_resumes(figure: go.Figure, run: TrainingRun, named: bool) -> None:
    """A line where a run went on, and a band over the steps that it therefore did again."""
    for step, interrupted in run.resumes:
        figure.add_shape(type="line", x0=step, x1=step, y0=0, y1=1, yref="paper", line={"width": 1, "dash": "dot"})
        if interrupted > step:
            figure.add_shape(
                type="rect", x0=step, x1=interrupted, y0=0, y1=1, yref="paper", layer="below", line={"width": 0}
            )
        if named and len(run.resumes) <= MAX_NAMED_RESUMES:
            figure.add_annotation(
                x=step, y=1, yref="paper", text="resumed", showarrow=False, xanchor="left", yanchor="top", xshift=3
            )


def _mark_checkpoints(figure: go.Figure, run: TrainingRun) -> None:
    """A triangle on the step axis for every checkpoint: filled where it is still kept."""
    if not run.checkpoints:
        return
    saved = run.checkpoints[: -MAX_POINTS - 1 : -1]  # the legend shows the first one's triangle: the newest's
    figure.add_scatter(
        x=[checkpoint.step for checkpoint in saved],
        y=[0.02] * len(saved),
        yaxis="y2",
        name="checkpoint",
        meta="muted",
        mode="markers",
        marker={
            "size": 9,
            "symbol": ["triangle-up" if checkpoint.size is not None else "triangle-up-open" for checkpoint in saved],
        },
        text=["kept" if checkpoint.size is not None else "removed since" for checkpoint in saved],
        hovertemplate="%{text}",
    )
    figure.update_layout(
        yaxis2={"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True, "showgrid": False}
    )
