"""`megakor import-config`: GPT-NeoX's configuration as an experiment of ours."""

from __future__ import annotations

from megakor.config.compose import main
from megakor.config.schema import ImportConfig
from megakor.interop.neox_experiment import import_config


def run(config: ImportConfig) -> None:
    """Print what becomes of every key, and write the experiment."""
    import_config(config)


if __name__ == "__main__":
    main("import-config", run)
