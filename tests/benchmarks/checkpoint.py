"""Saving and loading a checkpoint, against plain `torch.save` and `torch.load` of the same bytes.

    python -m tests.benchmarks.checkpoint [--megabytes 1200] [--rounds 7] [--folder /fast/disk]

One process holds the fp32 weights and both moments of a model. Each round does all of these in turn, in an order of its
own, so that a busy moment of the machine or the disk meets all alike; ratios are medians over rounds of figures of one
round. All writers sync their files, so that the disk is counted. All readers read what the page cache holds, into
memory that is there already. The newest checkpoint is whole until the next one is: all writers write a new file first.

- save_bandwidth_ratio: `torch.save` over a synchronous save, with SHA-256, table and manifest (above 1: we are faster)
- load_bandwidth_ratio: `torch.load` and a copy into the live tensors, over a load
- async_stall_ratio: what training waits for in an asynchronous save over a synchronous save
- reshaped_load_ratio: a load from what two tensor ranks wrote, over one from what this layout wrote
- load_peak_ratio: host memory over the part's bytes while loading, the part itself included
- save_peak_ratio: the same while saving asynchronously: the part and its copy
- verify_gb_per_second: SHA-256 of all files, as a resume compares them first, one process

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megakor.checkpoint.format import CheckpointManifest, step_folder
from megakor.checkpoint.keep import Keep
from megakor.checkpoint.reader import CheckpointValues
from megakor.checkpoint.save import Saver, commit, save_checkpoint, write_pieces
from megakor.config.schema import ModelConfig
from megakor.model.specs import WHOLE, parameter_specs
from megakor.train.optimizer import Piece
from tests.resident import give_back_freed_blocks, peak_resident_size, resident_size

STATES = ("weight", "exp_avg", "exp_avg_sq")
BYTES_PER_BLOCK = 12 * 12 * 1024 * 1024 + 12 * 13 * 1024  # weights and moments of a block at hidden size 1,024
READERS = 4  # as the engine has


def model_of(megabytes: int) -> ModelConfig:
    """A model whose weights and moments take about so much."""
    num_layers = max(1, round((megabytes * 1e6 - 12 * 2 * 8192 * 1024) / BYTES_PER_BLOCK))
    return ModelConfig(hidden_size=1024, num_hidden_layers=num_layers, num_attention_heads=16,
                       intermediate_size=4096, vocab_size=8192, rotary_pct=0.5)  # fmt: skip


def pieces_of(model: ModelConfig) -> list[Piece]:
    """Its state, as one rank holds it."""
    generator = torch.Generator().manual_seed(0)
    return [
        Piece(state, spec.name, spec.shape, WHOLE, 0, torch.randn(spec.shape, generator=generator).flatten(), True)
        for spec in parameter_specs(model)
        for state in STATES
    ]


def manifest_of(model: ModelConfig, step: int) -> CheckpointManifest:
    optimizer = {"name": "adamw", "groups": [], "steps": step, "loss_scale": {}}
    return CheckpointManifest(step, 8192, asdict(model), "", optimizer, {}, {})


def save_as_tensor_ranks(run: Path, model: ModelConfig, pieces: list[Piece]) -> Path:
    """The same state as two tensor ranks would write it."""
    specs = {spec.name: spec for spec in parameter_specs(model)}
    folder, aside = step_folder(run, 1), run / "aside"
    aside.mkdir(parents=True)
    files = []
    for index in range(2):
        own = []
        for piece in pieces:
            shard = specs[piece.name].shard(index, 2)
            if shard.count > 1 or index == 0:
                values = shard.of(piece.values.view(piece.shape)).flatten()
                own.append(replace(piece, shard=shard, values=values))
        files.append(write_pieces(aside, index, own))
    folder.parent.mkdir(parents=True, exist_ok=True)
    commit(aside, folder, manifest_of(model, 1), [file for file in files if file is not None])
    return folder


def load(folder: Path, pieces: list[Piece]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with CheckpointValues(folder) as values, ThreadPoolExecutor(READERS) as pool:
        list(pool.map(lambda piece: values.fill(piece.values, piece.state, piece.name, piece.offset), pieces))


def torch_save(path: Path, pieces: list[Piece]) -> None:
    """Into a new file that takes the old one's place, as ours do: memory for its pages costs both the same."""
    aside = path.with_suffix(".new")
    with aside.open("wb") as file:
        torch.save({f"{piece.state}/{piece.name}": piece.values for piece in pieces}, file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def torch_load(path: Path, pieces: list[Piece]) -> None:
    found = torch.load(path, weights_only=True)
    for piece in pieces:
        piece.values.copy_(found[f"{piece.state}/{piece.name}"])


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def typical(function: Callable[[], object]) -> float:
    """Seconds of what takes a tenth of one: the median of five times."""
    return statistics.median(seconds(function) for _ in range(5))


def peak_during(function: Callable[[], object]) -> int:
    """The highest resident size of this process while it calls a function, bytes (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
    function()
    return peak_resident_size()


class Bench:
    """The state, its folders, and each thing that is timed."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self.folder, self.model, self.pieces = folder, model, pieces_of(model)
        self.num_bytes = sum(4 * piece.values.numel() for piece in self.pieces)
        self.saver = Saver(folder / "beside", self.pieces, Keep(last=1))
        self.resharded = save_as_tensor_ranks(folder / "tensor ranks", model, self.pieces)
        self.step = 1
        self.save()
        torch_save(folder / "plain.pt", self.pieces)
        self.stall()  # makes the copy's memory

    def save(self) -> float:
        return seconds(lambda: save_checkpoint(self.folder / "run", manifest_of(self.model, 1), self.pieces))

    def stall(self) -> float:
        """Of an asynchronous save; the rest of it is waited for, untimed."""
        self.step += 1
        stalled = seconds(lambda: self.saver.start(manifest_of(self.model, self.step)))
        while self.saver.state == 1:
            time.sleep(0.005)
        settled = seconds(self.saver.settle)
        self.saver.finish()
        return stalled + settled

    def verify(self) -> float:
        folder = step_folder(self.folder / "run", 1)
        return seconds(lambda: CheckpointManifest.load(folder).check_contents(folder))

    def timed(self) -> dict[str, Callable[[], float]]:
        own, plain = step_folder(self.folder / "run", 1), self.folder / "plain.pt"
        return {
            "save": self.save,
            "torch_save": lambda: seconds(lambda: torch_save(plain, self.pieces)),
            "stall": self.stall,
            "load": lambda: typical(lambda: load(own, self.pieces)),
            "torch_load": lambda: seconds(lambda: torch_load(plain, self.pieces)),
            "resharded_load": lambda: typical(lambda: load(self.resharded, self.pieces)),
            "verify": self.verify,
        }

    def peaks(self) -> dict[str, float]:
        """Host memory while loading, and while saving beside training, over the bytes of the state."""
        give_back_freed_blocks()
        base = resident_size() - 2 * self.num_bytes  # the state and the saver's copy
        peak = peak_during(lambda: load(self.resharded, self.pieces))
        saving = peak_during(self.stall)
        return {
            "load_peak_ratio": (peak - base - self.num_bytes) / self.num_bytes,
            "save_peak_ratio": (saving - base) / self.num_bytes,
        }


def ratios(rounds: list[dict[str, float]]) -> dict[str, float | list[float]]:
    """Medians over rounds, with their ranges."""
    pairs = {
        "save_bandwidth_ratio": ("torch_save", "save"),
        "load_bandwidth_ratio": ("torch_load", "load"),
        "async_stall_ratio": ("stall", "save"),
        "reshaped_load_ratio": ("resharded_load", "load"),
    }
    found: dict[str, float | list[float]] = {}
    for name, (over, under) in pairs.items():
        values = sorted(one[over] / one[under] for one in rounds)
        found[name] = statistics.median(values)
        found[name.replace("ratio", "range")] = [values[0], values[-1]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; default: the system's /tmp")
    arguments = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        bench = Bench(folder, model_of(arguments.megabytes))
        timed, dice, rounds = bench.timed(), random.Random(0), []
        for number in range(arguments.rounds):
            order = list(timed)
            dice.shuffle(order)
            one = {name: timed[name]() for name in order}
            rounds.append(one)
            print(f"round {number + 1}", {name: round(value, 3) for name, value in one.items()}, flush=True)
        gigabytes = bench.num_bytes / 1e9
        medians = {name: statistics.median(one[name] for one in rounds) for name in timed}
        found = ratios(rounds) | bench.peaks()
        found |= {"gigabytes": gigabytes, "save_gb_per_second": gigabytes / medians["save"],
                  "load_gb_per_second": gigabytes / medians["load"], "stall_seconds": medians["stall"],
                  "verify_gb_per_second": gigabytes / medians["verify"]}  # fmt: skip
        bench.saver.close()
        print(json.dumps(found))
    finally:
        shutil.rmtree(folder)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
