"""The table of pieces and the manifest of a 12.8B model under ZeRO-3 on 512 ranks, without any tensor's data."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from megakor.checkpoint.format import CheckpointManifest, FileEntry, TensorEntry, piece_key
from megakor.checkpoint.pieces import Held, PieceIndex
from megakor.config.compose import config_folder
from megakor.config.schema import ModelConfig
from megakor.model.specs import num_parameters, parameter_specs
from tests.checkpoint.pieces import STATES
from tests.ranks import run_ranks
from tests.resident import give_back_freed_blocks, peak_resident_size, resident_size

NUM_RANKS = 512
MODEL = ModelConfig(**yaml.safe_load((config_folder() / "model" / "12_8b.yaml").read_text()))


def held_by_ranks() -> tuple[dict[str, list[Held]], dict[str, int]]:
    """What each rank's file holds, as `write_pieces` tells it, and the size of each file."""
    headers = [0] * NUM_RANKS
    pieces: list[list[tuple[str, tuple[int, ...], int, int]]] = [[] for _ in range(NUM_RANKS)]
    for state in STATES:
        for spec in parameter_specs(MODEL):
            numel = math.prod(spec.shape)
            part = -(-numel // NUM_RANKS)  # ZeRO-3 gives every rank as many elements, and the last ones fewer
            for rank in range(NUM_RANKS):
                if (own := min(part, numel - rank * part)) > 0:
                    pieces[rank].append((f"{state}/{spec.name}", spec.shape, rank * part, own))
                    headers[rank] += len(piece_key(f"{state}/{spec.name}", 1, 0, rank * part)) + 60
    held: dict[str, list[Held]] = {}
    sizes: dict[str, int] = {}
    for rank in range(NUM_RANKS):
        name, begin = f"rank-{rank:05d}.safetensors", 8 + headers[rank]
        held[name] = []
        for tensor, shape, offset, own in pieces[rank]:
            held[name].append(Held(tensor, shape, 0, 1, 0, offset, own, begin))
            begin += 4 * own
        sizes[name] = begin
    return held, sizes


Cost = tuple[float, float]
"""Seconds of process time, megabytes of host memory at the peak."""


@contextmanager
def measured(costs: dict[str, Cost], name: str) -> Iterator[None]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = resident_size(), time.process_time()
    yield
    costs[name] = (time.process_time() - start, (peak_resident_size() - before) / 1e6)


def measure() -> tuple[dict[str, Cost], dict[str, int]]:
    """Costs of each part, and counts; in a process of its own."""
    give_back_freed_blocks()
    costs: dict[str, Cost] = {}
    PieceIndex.from_bytes(PieceIndex.of({"a": [Held("weight/a", (1,), 0, 1, 0, 0, 1, 8)]}).to_bytes())  # Arrow starts
    held, sizes = held_by_ranks()
    with measured(costs, "of"):
        built = PieceIndex.of(held)
    with measured(costs, "to_bytes"):
        table = built.to_bytes()
    shapes = {piece.tensor: piece.shape for pieces in held.values() for piece in pieces}
    manifest = CheckpointManifest(
        1000, 30_000, asdict(MODEL), "", {"steps": 1000}, {}, {},
        files={name: FileEntry(size, "0" * 64) for name, size in sizes.items()},
        tensors={name: TensorEntry(list(shape), 0, 1) for name, shape in shapes.items()},
    )  # fmt: skip
    with measured(costs, "manifest"):
        text = manifest.to_json()
    same = len(built)
    del built, held
    with measured(costs, "load and check"):
        index = PieceIndex.from_bytes(table)
        index.check({name: (shape, 1) for name, shape in shapes.items()}, sizes)
    rng, names = random.Random(0), list(shapes)
    with measured(costs, "1,000 lookups"):
        for _ in range(1000):
            name = rng.choice(names)
            numel = math.prod(shapes[name])
            start = rng.randrange(numel)
            stop = min(numel, start + numel // 8 + 1)
            rows = index.overlapping(name, 0, start, stop)
            assert index.offset[rows[0]] <= start < index.offset[rows[0]] + index.numel[rows[0]]
            assert index.offset[rows[-1]] < stop <= index.offset[rows[-1]] + index.numel[rows[-1]]
    counts = {"rows": len(index), "same": len(index) - same, "table": len(table), "manifest": len(text)}
    return costs, counts


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are Linux's")
def test_twelve_billion_on_512_ranks() -> None:
    assert num_parameters(MODEL) == 12_893_603_840
    ((costs, counts),) = run_ranks(measure, 1)
    print(f"\n{counts['rows']:,} rows; table {counts['table']:,} bytes, manifest {counts['manifest']:,} bytes")
    for name, (seconds, megabytes) in costs.items():
        print(f"{name:<14}  {seconds:6.3f} s  {megabytes:6.1f} MB at the peak")
    assert counts["rows"] == 1452 * NUM_RANKS  # every tensor has elements for every rank
    assert counts["same"] == 0
    assert counts["table"] < 20e6
    assert counts["manifest"] < 1e6
    assert costs["of"][0] < 10
    assert costs["load and check"][0] < 3
    assert costs["1,000 lookups"][0] < 1
    for name, bound in (("of", 300), ("to_bytes", 200), ("manifest", 20), ("load and check", 300)):
        assert costs[name][1] < bound, name
