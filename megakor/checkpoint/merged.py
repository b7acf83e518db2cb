"""A run of adapters as a whole model: W + alpha / rank · B A, of any range of any weight, while it is read.

the base's weights ─┐
A and B ────────────┴─► `MergedValues` ─► generate, evaluate, export, and the base of a next run
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import torch

from megakor.checkpoint.format import MANIFEST, WEIGHT, AdapterEntry, CheckpointManifest
from megakor.checkpoint.tensors import CHUNK
from megakor.files import sha256_of
from megakor.model.lora import adapters_of
from megakor.model.specs import WHOLE, Shard


class Weights(Protocol):
    """A source of weights that any range is read of: a checkpoint, or merged ones. It is open, and closed on exit."""

    manifest: CheckpointManifest

    @property
    def optimizer_steps(self) -> int: ...

    @property
    def loss_scale(self) -> dict[str, float] | None: ...

    def __enter__(self) -> Weights: ...

    def __exit__(self, *_: object) -> None: ...

    def fill(self, out: torch.Tensor, state: str, name: str, start: int, shard: Shard = WHOLE) -> None: ...

    def read(self, state: str, name: str, start: int, stop: int, shard: Shard = WHOLE) -> torch.Tensor: ...


class MergedValues:
    """The weights of a base with a checkpoint's adapters added; serves as `CheckpointValues` without optimizer does.

    A context manager, which closes both. Any number of threads may read at once. Host memory of each: a few times
    `CHUNK`, and the adapters of one linear.

    Args:
        base: the base's weights; they may be merged ones themselves.
        adapters: the checkpoint.
    """

    optimizer_steps: int = 0
    loss_scale: dict[str, float] | None = None

    def __init__(self, base: Weights, adapters: Weights) -> None:
        entry = adapters.manifest.adapters
        assert entry is not None
        self.base, self.adapters, self.manifest = base, adapters, adapters.manifest
        self.scale, self.rank = entry.alpha / entry.rank, entry.rank

    def __enter__(self) -> MergedValues:
        return self

    def __exit__(self, *_: object) -> None:
        self.adapters.__exit__()
        self.base.__exit__()

    @torch.no_grad()
    def fill(self, out: torch.Tensor, state: str, name: str, start: int, shard: Shard = WHOLE) -> None:
        """Fill `out`, 1-D of any type on any device, with elements from `start` on; `CHUNK` of them at a time."""
        if state != WEIGHT:
            out.zero_()
            return
        for first in range(0, out.numel(), CHUNK):
            part = out[first : first + CHUNK]
            part.copy_(self.read(state, name, start + first, start + first + part.numel(), shard))

    def read(self, state: str, name: str, start: int, stop: int, shard: Shard = WHOLE) -> torch.Tensor:
        """Elements [start, stop) of a flattened weight or of a shard of it, fp32.

        The sum is taken in fp64 and rounded once, so that it does not show how a weight was cut to read it.

        Raises:
            ValueError: the base does not hold them, or they are not of a weight.
        """
        if state != WEIGHT:
            raise ValueError(f"{state}/{name} must be of {WEIGHT}: merged weights have no optimizer state")
        values, (down_name, up_name) = self.base.read(state, name, start, stop, shard), adapters_of(name)
        down_entry = self.manifest.tensors.get(f"{WEIGHT}/{down_name}")
        if down_entry is None or start == stop:
            return values
        up_entry = self.manifest.tensors[f"{WEIGHT}/{up_name}"]
        down = self.adapters.read(WEIGHT, down_name, 0, math.prod(down_entry.shape)).view(down_entry.shape)
        down = shard.of(down) if shard.dim == 1 else down  # [rank, columns]
        columns = down.shape[1]
        first, last = start // columns, -(-stop // columns)
        rows_before = up_entry.shape[0] // shard.count * shard.index if shard.dim == 0 else 0
        begin, end = (self.rank * (rows_before + row) for row in (first, last))
        up = self.adapters.read(WEIGHT, up_name, begin, end).view(-1, self.rank)  # [rows, rank]
        added = (self.scale * up.double() @ down.double()).flatten()[start - first * columns : stop - first * columns]
        return added.add_(values).float()


def base_of(folder: Path, entry: AdapterEntry) -> Path:
    """The checkpoint folder that a checkpoint's adapters are of.

    Raises:
        ValueError: it is not there, or another one is.
    """
    manifest = Path(entry.base) / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{folder}: its base {entry.base} must be there, since it holds adapters of it alone")
    if sha256_of(manifest) != entry.base_sha256:
        raise ValueError(
            f"{folder}: its base {entry.base} must be the checkpoint of step {entry.base_step} that its adapters were "
            "trained on; another one is there"
        )
    return Path(entry.base)
