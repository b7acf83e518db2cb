"""`megakor generate`: continue a prompt, or answer a question."""

from __future__ import annotations

from megakor.config.compose import main
from megakor.config.schema import GenerateConfig
from megakor.generate.speaker import Speaker


def run(config: GenerateConfig) -> None:
    """Print each continuation or answer."""
    for text in Speaker.load(config.run).generate(config):
        print(text)


if __name__ == "__main__":
    main("generate", run)
