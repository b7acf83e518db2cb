"""A small training state, its pieces in any cut, and saving it from one process or several."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from megakor.checkpoint.format import MANIFEST, PIECES, CheckpointManifest, digest
from megakor.checkpoint.keep import Keep
from megakor.checkpoint.save import save_checkpoint
from megakor.files import sha256_of
from megakor.model.specs import WHOLE, parameter_specs
from megakor.train.optimizer import Piece
from tests.model.configs import small

MODEL = small(hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=2)
NUM_TOKENS = 60
STATES = ("weight", "exp_avg", "exp_avg_sq")


def state(seed: int = 0) -> dict[tuple[str, str], torch.Tensor]:
    """Every state tensor, whole, by (state, name)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (kind, spec.name): torch.randn(spec.shape, generator=generator)
        for spec in parameter_specs(MODEL)
        for kind in STATES
    }


def manifest(step: int, **changes: object) -> CheckpointManifest:
    return CheckpointManifest(
        step=step,
        num_tokens=NUM_TOKENS,
        model=asdict(MODEL),
        tokenizer_fingerprint="지문",
        optimizer={"name": "adamw", "groups": [], "steps": step - 1, "loss_scale": {}},
        data={"seed": 1},
        train={"name": "시험"},
        **changes,  # type: ignore[arg-type]
    )


def cut(rank: int, world_size: int, seed: int) -> list[Piece]:
    """This rank's pieces. Every rank also holds a copy of some that another one writes."""
    rng, pieces = random.Random(seed), []
    for (kind, name), whole in state().items():
        size = whole.numel()
        borders = sorted({0, size, *(rng.randint(0, size) for _ in range(rng.randint(0, 3)))})
        for start, stop in itertools.pairwise(borders):
            writer, copied = rng.randrange(world_size), rng.random() < 0.2
            if writer == rank or copied:
                values = whole.view(-1)[start:stop].clone()
                pieces.append(Piece(kind, name, tuple(whole.shape), WHOLE, start, values, writer == rank))
    return pieces


def sharded_pieces(index: int, count: int, seed: int) -> list[Piece]:
    """What tensor rank `index` of `count` holds, cut at random; it writes its own shards, the first rank the rest."""
    rng, pieces = random.Random(seed), []
    specs = {spec.name: spec for spec in parameter_specs(MODEL)}
    for (kind, name), whole in state().items():
        shard = specs[name].shard(index, count)
        part = shard.of(whole).flatten()
        borders = sorted({0, part.numel(), *(rng.randint(0, part.numel()) for _ in range(rng.randint(0, 3)))})
        for start, stop in itertools.pairwise(borders):
            writes = shard.count > 1 or index == 0
            pieces.append(Piece(kind, name, tuple(whole.shape), shard, start, part[start:stop], writes))
    return pieces


def whole_pieces(seed: int = 0) -> list[Piece]:
    return [
        Piece(kind, name, tuple(whole.shape), WHOLE, 0, whole.reshape(-1), True)
        for (kind, name), whole in state(seed).items()
    ]


def save(run: Path, step: int, keep_last: int = 0, seed: int = 0) -> Path:
    """One process saves everything; the process group must be there."""
    return save_checkpoint(run, manifest(step), whole_pieces(seed), Keep(keep_last))


def save_cut(run: Path, step: int, seed: int) -> Path:
    """Each rank saves its pieces."""
    pieces = cut(dist.get_rank(), dist.get_world_size(), seed)
    return save_checkpoint(run, manifest(step), pieces)


def snapshot(run: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = json.loads((folder / MANIFEST).read_text())
    del raw["digest"]
    change(raw)
    (folder / MANIFEST).write_text(json.dumps({**raw, "digest": digest(raw)}))  # as a writer would have it


def retable(folder: Path, change: Callable[[dict[str, list]], None]) -> None:
    """Change the table of pieces, as a writer would have it."""
    columns = pq.read_table(folder / PIECES).to_pydict()
    change(columns)
    pq.write_table(pa.table(columns), folder / PIECES)
    entry = {"size": (folder / PIECES).stat().st_size, "sha256": sha256_of(folder / PIECES)}
    edit(folder, lambda raw: raw["files"].update({PIECES: entry}))
