"""`megakor simulate`: parameters, communication and memory of a pretraining layout, without its machines."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

from megakor.config.compose import main
from megakor.config.schema import SimulateConfig


def run(config: SimulateConfig) -> None:
    """Print the figures as tables or as one JSON object."""
    with redirect_stdout(sys.stderr):  # where DeepSpeed, once imported, prints and logs to
        from megakor.simulate.layout import simulate
        from megakor.simulate.table import as_json, print_tables

        simulation = simulate(config)
    if config.format == "json":
        print(as_json(simulation))
    else:
        print_tables(simulation)


if __name__ == "__main__":
    main("simulate", run)
