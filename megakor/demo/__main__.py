"""`megakor demo`: the whole arc on two processes."""

from __future__ import annotations

import json

from megakor.config.compose import load_experiment, main
from megakor.config.schema import DemoConfig
from megakor.demo.arc import Arc
from megakor.logs import get_logger


def run(config: DemoConfig) -> None:
    """Run the arc; print the summary and where the report is."""
    experiment = load_experiment("pretrain", "demo")
    num_steps = config.num_steps or experiment.train.num_steps
    arc = Arc(config, num_steps, experiment.checkpoint.interval)
    summary = arc.run()
    print(json.dumps(summary, ensure_ascii=False, indent=1))
    get_logger(__name__).info("the report: %s", arc.folder / "report.html")


if __name__ == "__main__":
    main("demo", run)
