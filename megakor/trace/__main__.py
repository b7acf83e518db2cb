"""`megakor trace`: which documents made a step's batch, and which steps saw a document."""

from __future__ import annotations

from megakor.config.compose import main
from megakor.config.schema import TraceConfig
from megakor.trace.trace import trace


def run(config: TraceConfig) -> None:
    """Print it."""
    trace(config)


if __name__ == "__main__":
    main("trace", run)
