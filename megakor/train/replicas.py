"""Whether ranks that should hold the same parameters do, to the last bit.

A bit that flips in a device's memory or arithmetic raises no error: the replica goes on from other weights, and the run
learns from both. Each rank adds up a checksum of every parameter on its own device; the sums are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

CHUNK = 2**22
"""Elements that a checksum works through at a time; it takes about 160 MB beside them."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of an element's size in bytes."""

SPREAD = 0x9E3779B1  # 2^32 over the golden ratio, to odd (Knuth, The Art of Computer Programming, vol. 3, 6.4)


@dataclass(frozen=True)
class Difference:
    """A parameter that is not the same on all ranks.

    Attributes:
        name: of the parameter.
        ranks: global ranks that hold another value than most; all ranks where no value is held by the most.
        decided: whether one value is.
    """

    name: str
    ranks: tuple[int, ...]
    decided: bool

    def __str__(self) -> str:
        ranks = ("rank " if len(self.ranks) == 1 else "ranks ") + ", ".join(map(str, self.ranks))
        if self.decided:
            return f"{self.name}: {ranks} {'differs' if len(self.ranks) == 1 else 'differ'} from the others"
        return f"{self.name}: {ranks} differ, and no majority says which is right"


def weights(start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Odd weights of positions below 2^32, each another. # [stop - start], int64, below 2^33

    Multiplying by an odd number and folding the upper half onto the lower are bijections of 32 bits, so the weights
    stay distinct while their differences follow no pattern.
    """
    position = torch.arange(start, stop, dtype=torch.int64, device=device)
    mixed = (position * SPREAD) & 0xFFFFFFFF
    return ((mixed ^ (mixed >> 16)) << 1) | 1


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's elements, read as integers, times the weights of their positions, modulo 2^64. # [], int64

    Flipping any one bit changes it, by a power of two below 2^64 times an odd number. So does swapping any two elements
    that differ, of up to 4 bytes and below position 2^32: the change is the difference of the weights, which 2^33 does
    not divide, times that of the elements, which 2^32 does not, so 2^64 does not divide the product. Other changes go
    unnoticed about as often as 64 random bits are all 0.

    It is computed on the tensor's device, and the same on every device.
    """
    bits = tensor.detach().view(BITS[tensor.element_size()]).flatten()
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), CHUNK):
        chunk = bits[start : start + CHUNK].to(torch.int64)
        total += (chunk * weights(start, start + chunk.numel(), bits.device)).sum()
    return total


def checksums(named_parameters: Iterable[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """The checksum of each parameter, on their device. # [num_parameters], int64"""
    return torch.stack([checksum(tensor) for _, tensor in named_parameters])


def differing(named: Iterable[tuple[str, torch.Tensor]], group: dist.ProcessGroup | None) -> list[Difference]:
    """The parameters that are not the same on all ranks of a group, in their order; empty: all is well.

    Every rank of the group calls, between steps, with the same parameters in the same order; all get the same answer.
    A parameter that ZeRO-3 has partitioned is held by no rank, so there is nothing to compare there.

    Args:
        named: parameters by name; at least one.
        group: ranks that hold the same parameters, such as `Groups.replicas`; None: all ranks.
    """
    named = list(named)
    own = checksums(named)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    table = torch.stack(gathered).cpu()  # [group ranks, parameters]
    ranks = dist.get_process_group_ranks(group)
    unequal = (table != table[0]).any(dim=0).nonzero().flatten().tolist()
    return [compare(named[index][0], ranks, table[:, index].tolist()) for index in unequal]


def compare(name: str, ranks: list[int], sums: list[int]) -> Difference:
    """Which ranks hold another value than most; the value of the most ranks is right unless another has as many."""
    (first, most), (_, second) = Counter(sums).most_common(2)
    if most == second:
        return Difference(name, tuple(ranks), decided=False)
    return Difference(name, tuple(r for r, value in zip(ranks, sums, strict=True) if value != first), decided=True)
