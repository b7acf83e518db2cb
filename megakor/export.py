"""`megakor export`: write a checkpoint as a Hugging Face folder and check it, or its adapters alone for PEFT."""

from __future__ import annotations

from megakor.config.compose import main
from megakor.config.schema import ExportConfig
from megakor.interop.adapters import export_adapters
from megakor.interop.huggingface import export


def run(config: ExportConfig) -> None:
    """Write the folder; it is there whole, or not at all."""
    if config.adapters:
        export_adapters(config)
    else:
        export(config)


if __name__ == "__main__":
    main("export", run)
