"""`megakor drill`: a short training that is disturbed again and again, compared with one that is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megakor.config.compose import main
from megakor.config.schema import DrillConfig
from megakor.demo.commands import override, verb
from megakor.demo.commands import run as run_commands
from megakor.drill.drill import Drill

MARKER = "drill.json"


def data_of(config: DrillConfig) -> list[str]:
    """Overrides that name the shards and their tokenizer; made of the sample where none are given."""
    if config.data is not None and config.tokenizer is not None:
        return [override("data.train", config.data), override("data.tokenizer", config.tokenizer)]
    made = Path(config.run) / "data"
    corpus, tokenizer, shards = made / "corpus", made / "tokenizer", made / "shards"
    inputs = [str(corpus / "train.jsonl")]
    run_commands(verb("corpus", out=corpus, max_bytes=200_000))
    run_commands(verb("train-tokenizer", inputs=inputs, out=tokenizer, vocab_size=2000))
    run_commands(verb("shard", inputs=inputs, tokenizer=tokenizer, out=shards, shard_size=10_000))
    return [override("data.train", shards), override("data.tokenizer", tokenizer)]


def run(config: DrillConfig) -> None:
    """Hold a drill, print what it found, and fail if anything was lost, overlooked or hung."""
    folder = Path(config.run)
    if folder.exists():
        if any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise ValueError(f"run={folder} must be new, empty or an earlier drill's folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text(json.dumps({"seed": config.seed}))
    drill = Drill(config, data_of(config))
    found = drill.hold()
    drill.tell()
    if found.problems:
        raise OSError(f"run={folder}: {len(found.problems)} problems, the first: {found.problems[0]}")


if __name__ == "__main__":
    main("drill", run)
