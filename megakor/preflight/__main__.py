"""`megakor preflight`: the machines of a run, checked in under a minute. Every rank runs this under any launcher."""

from __future__ import annotations

import gc
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from megakor.config.compose import main
from megakor.config.schema import PreflightConfig


def run(config: PreflightConfig) -> None:
    """Print a table or one JSON object on rank 0; all ranks end together, with status 1 where there is a fault."""
    with redirect_stdout(sys.stderr):  # where DeepSpeed, once imported, prints and logs to
        gc.disable()  # a third of the imports' time goes to it, for nothing
        from megakor.preflight.flight import Faulty, Preflight
        from megakor.preflight.hardware import probe, write_hardware
        from megakor.preflight.table import as_json, print_table
        from megakor.train.run import process_group

        gc.freeze()
        gc.enable()
        flight = Preflight(
            config, config.wait_seconds, config.slow_below, partial(probe, config) if config.out else None
        )
        try:
            flight.meet()
            with process_group(config):
                flight.measure()
        except Faulty:
            pass  # the report has them
    report = flight.report
    if flight.rank == 0:
        if config.format == "json":
            print(as_json(report), flush=True)
        else:
            print_table(report)
            sys.stdout.flush()
        if config.out is not None and config.watts is not None and not report.faults:
            write_hardware(Path(config.out), report, flight.probes, config.watts)
    flight.part()
    if report.faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main("preflight", run)
