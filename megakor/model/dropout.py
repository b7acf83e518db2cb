"""Dropout from a counter: a mask depends on where training stands, never on a random state that would need saving.

The seed of a mask is made from (seed, step, micro-batch, place in the model, part of the batch and tensor), so a
resumed run and a recomputed block draw the same one. Ranks that hold different parts draw different masks, so runs in
two layouts agree only without dropout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass
class DropoutCounter:
    """Where training stands. The engine calls `start_step`, the model `next_micro_batch` in each forward pass.

    Attributes:
        seed: of the run.
        residual: number of this rank's part of the residual stream; ranks that hold the same part share it.
        heads: number of this rank's part of the attention heads.
        devices: accelerators whose generators draw the masks; none on CPUs.
    """

    seed: int = 0
    residual: int = 0
    heads: int = 0
    devices: tuple[torch.device, ...] = ()
    step: int = 0
    micro_batch: int = -1

    def start_step(self, step: int) -> None:
        self.step, self.micro_batch = step, -1

    def next_micro_batch(self) -> None:
        self.micro_batch += 1

    def key(self, place: str, part: int) -> int:
        """The seed of the mask at a place of the model, 63 bits."""
        where = f"{self.seed}:{self.step}:{self.micro_batch}:{part}:{place}"
        return int.from_bytes(hashlib.sha256(where.encode()).digest()[:8], "little") >> 1

    @contextmanager
    def seeded(self, key: int) -> Iterator[None]:
        """Random numbers from `key` inside; the generators are as before afterwards."""
        kind = {"device_type": self.devices[0].type} if self.devices else {}
        with torch.random.fork_rng(self.devices, **kind):
            if self.devices:
                torch.manual_seed(key)
            else:  # the host's alone: the other one notes a stack trace for each kind of accelerator
                torch.default_generator.manual_seed(key)
            yield

    def dropout(self, hidden_states: torch.Tensor, probability: float, key: int | None) -> torch.Tensor:
        """Dropout with the mask of `key`; None: none."""
        if key is None:
            return hidden_states
        with self.seeded(key):
            return functional.dropout(hidden_states, probability)
