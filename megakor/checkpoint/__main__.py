"""`megakor checkpoint list|verify|prune|export-universal`: look at a run's checkpoints, remove and convert them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from megakor.checkpoint.inventory import list_checkpoints
from megakor.checkpoint.prune import prune_run
from megakor.checkpoint.universal import export_universal
from megakor.checkpoint.verify import verify
from megakor.cli import main
from megakor.config.schema import (
    CheckpointListConfig,
    CheckpointPruneConfig,
    CheckpointVerifyConfig,
    ExportUniversalConfig,
)

ACTIONS: dict[type, Callable[[Any], None]] = {
    CheckpointListConfig: list_checkpoints,
    CheckpointVerifyConfig: verify,
    CheckpointPruneConfig: prune_run,
    ExportUniversalConfig: export_universal,
}


def run(config: Any) -> None:
    """Do what the configuration's type asks for."""
    ACTIONS[type(config)](config)


if __name__ == "__main__":
    main(["checkpoint", *sys.argv[1:]])
