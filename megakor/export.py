"""`megakor export`: write a checkpoint as a Hugging Face folder and check it against its source."""

from __future__ import annotations

from megakor.config.compose import main
from megakor.config.schema import ExportConfig
from megakor.interop.huggingface import export


def run(config: ExportConfig) -> None:
    """Write the folder; it is there whole, or not at all."""
    export(config)


if __name__ == "__main__":
    main("export", run)
