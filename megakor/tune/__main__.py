"""`megakor tune`: a few real steps of the planner's best layouts; the fastest is written as an experiment."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

from megakor.config.compose import main
from megakor.config.schema import TuneConfig


def run(config: TuneConfig) -> None:
    """Try layouts, write the winner, and print what was tried as a table or as one JSON object."""
    with redirect_stdout(sys.stderr):  # where DeepSpeed, once imported, prints and logs to
        from megakor.tune.report import as_json, print_table, write_winner
        from megakor.tune.tune import tune

        trials = tune(config)
        command = write_winner(config, trials[0])
    print(as_json(trials, command)) if config.format == "json" else print_table(trials, command)


if __name__ == "__main__":
    main("tune", run)
