"""`megakor report`: one self-contained HTML page about a run."""

from __future__ import annotations

from pathlib import Path

from megakor.config.compose import main
from megakor.config.schema import ReportConfig
from megakor.report.page import write_report


def run(config: ReportConfig) -> None:
    """Write `report.html`."""
    write_report(Path(config.run), Path(config.out) if config.out else None)


if __name__ == "__main__":
    main("report", run)
