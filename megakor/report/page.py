"""The page: a `Report` in; one HTML file out that loads nothing, not even a font.

collect ─► figures (Plotly) ─► templates/page.html.j2 with style.css, page.js and plotly.js inside ─► report.html
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from megakor import __version__
from megakor.files import atomic_write
from megakor.logs import get_logger
from megakor.report import words
from megakor.report.collect import Record, Report, TrainingRun, collect
from megakor.report.figures import figures

MAX_SOURCES = 12  # named on the page, the largest first
PACKAGES = ("torch", "deepspeed", "transformers", "sentencepiece", "numpy", "datasets", "safetensors", "hydra-core")
REFERENCES = {"unigram": "unigram_bits_per_byte", "order 0": "order0_bits_per_byte"}
SUMMARY_NAMES = {
    "order0_bits_per_byte": "order-0 bits per byte",
    "export_max_logit_difference": "export: largest logit difference",
    "instruct_first_loss": "instruction tuning: first loss",
    "instruct_last_loss": "instruction tuning: last loss",
    "resume_bitwise_equal": "resumed run is bitwise the same",
    "mfu": "MFU",
    "tokens_per_second": "tokens / s",
}

log = get_logger(__name__)


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page about a run or a demo; returns where it is.

    Args:
        run: the folder of a training run or of a demo.
        out: the page; None: `report.html` in the folder.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: nothing has been logged in it, or one of its files is damaged.
    """
    page = out or run / "report.html"
    html = render(collect(run))
    with atomic_write(page) as file:
        file.write(html.encode())
    log.info("report: %s", page)
    return page


def render(report: Report) -> str:
    """The page as HTML."""
    references = {name: report.summary[key] for name, key in REFERENCES.items() if _is_number(report.summary.get(key))}
    plots = {run.key: figures(run, references if run.key == "pretrain" else {}) for run in report.runs}
    environment = Environment(
        loader=PackageLoader("megakor.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        number=words.number, count=words.count, size=words.size, duration=words.duration, percent=words.percent
    )
    return environment.get_template("page.html.j2").render(
        report=report,
        plots=plots,
        tiles=_tiles(report),
        stages=_stages(report.summary),
        sources=_sources(report.corpus),
        measured=_measured(report.summary),
        versions=_versions(),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        figures_json=_script_json({key: plot.to_plotly_json() for run in plots.values() for key, plot in run.items()}),
        plotly=Markup(get_plotlyjs()),  # its writers keep it fit for a script element
    )


def _script_json(value: Any) -> Markup:
    """JSON that can stand in a script element: no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _values(records: Sequence[Record], key: str) -> list[float]:
    return [record[key] for record in records if _is_number(record.get(key))]


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the figures that stand first."""
    tiles = []
    summary, run = report.summary, report.runs[0]
    parameters, ranks = run.start.get("num_parameters"), run.start.get("world_size")
    if parameters:
        tiles.append(("parameters", words.count(parameters), _shape(run)))
    tokens = run.steps[-1].get("tokens")
    if tokens:
        tiles.append(("tokens seen", words.count(tokens), f"in {run.steps[-1]['step']:,} steps"))
    bits, remark = _final_bits(run, summary)
    if bits is not None:
        tiles.append(("bits per byte", words.number(float(bits), 4), remark))
    losses = _values(run.steps, "loss")
    if losses:
        tiles.append(("training loss", words.number(losses[-1], 4), f"from {words.number(losses[0], 4)}"))
    speed, utilisation = (_overall(run, summary, key) for key in ("tokens_per_second", "mfu"))
    if speed is not None:
        tiles.append(("tokens / s", words.count(speed), f"on {ranks} rank{'s' if ranks != 1 else ''}" if ranks else ""))
    if utilisation is not None:
        peak = run.start.get("peak_tflops")
        remark = f"of {words.number(float(peak), 3)} TFLOP/s" if peak else ""
        tiles.append(("MFU", words.percent(utilisation), remark))
    if isinstance(summary.get("resume_bitwise_equal"), bool):
        equal = summary["resume_bitwise_equal"]
        tiles.append(
            ("resume", "exact" if equal else "differs", "losses bit for bit" if equal else "from the whole run")
        )
    if _is_number(summary.get("export_max_logit_difference")):
        difference = words.number(float(summary["export_max_logit_difference"]), 3)
        tiles.append(("export", difference, "largest logit difference"))
    return tiles


def _overall(run: TrainingRun, summary: Mapping[str, Any], key: str) -> float | None:
    """The summary's figure; where it has none, the median of the steps'."""
    if _is_number(summary.get(key)):
        return float(summary[key])
    values = _values(run.steps, key)
    return median(values) if values else None


def _shape(run: TrainingRun) -> str:
    model = run.config.get("model") or {}
    layers, hidden = model.get("num_hidden_layers"), model.get("hidden_size")
    return f"{layers} layers × {hidden:,}" if layers and hidden else ""


def _final_bits(run: TrainingRun, summary: Mapping[str, Any]) -> tuple[float | None, str]:
    """The held-out figure, and what it is beside the unigram model's."""
    bits = summary.get("bits_per_byte")
    if not _is_number(bits):
        name, records = next(iter(run.validation.items()), ("", ()))
        found = _values(records, "bits_per_byte")
        return (found[-1], f"on {name}") if found else (None, "")
    unigram = summary.get("unigram_bits_per_byte")
    return bits, f"held out, {bits / unigram:.3f} × unigram" if _is_number(unigram) and unigram else "held out"


def _stages(summary: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(stage, seconds) in the order of the arc."""
    seconds = summary.get("seconds")
    stages = seconds.items() if isinstance(seconds, Mapping) else ()
    return [(name.replace("_", " "), value) for name, value in stages if name != "total" and _is_number(value)]


def _sources(corpus: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """(name, documents, bytes), the largest first; small ones past `MAX_SOURCES` together."""
    found = [(name, part["documents"], part["bytes"]) for name, part in corpus.get("sources", {}).items()]
    found.sort(key=lambda source: (-source[2], source[0]))
    rest = found[MAX_SOURCES:]
    if len(rest) > 1:
        others = (f"{len(rest):,} others", sum(part[1] for part in rest), sum(part[2] for part in rest))
        return [*found[:MAX_SOURCES], others]
    return found


def _measured(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Every plain figure of the summary."""
    plain = [(key, value) for key, value in summary.items() if isinstance(value, bool | int | float | str)]
    return [(SUMMARY_NAMES.get(key, key.replace("_", " ")), value) for key, value in plain]


def _versions() -> dict[str, str]:
    """What is installed here."""
    installed = {name: _version(name) for name in PACKAGES}
    found = {name: version for name, version in installed.items() if version}
    return {
        "megakor": __version__,
        "Python": platform.python_version(),
        **found,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
