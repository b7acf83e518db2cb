"""`megakor import-model`: a Hugging Face folder of a GPT-NeoX model as a run of ours, from safetensors alone."""

from __future__ import annotations

from megakor.config.compose import main
from megakor.config.schema import ImportModelConfig
from megakor.interop.import_model import import_model


def run(config: ImportModelConfig) -> None:
    """Write the run folder; it is there whole, or not at all."""
    import_model(config)


if __name__ == "__main__":
    main("import-model", run)
