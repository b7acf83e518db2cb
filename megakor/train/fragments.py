"""What this rank owns of the fp32 weights and the optimizer state, by canonical name.

DeepSpeed keeps a rank's share of the fp32 master weights as a flat tensor for each parameter group and links every
model parameter to its slice of it. `fragments` reads those links; checkpoints and Adafactor go by them, so both work
the same for every engine and ZeRO stage. ZeRO-0 has no flat tensors: there a fragment is a whole parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of one parameter, in row-major order, that this rank updates.

    Attributes:
        name: canonical name of the parameter.
        shape: shape of the parameter as this rank's model holds it.
        offset: first element within the flattened parameter.
        flat: the tensor that the optimizer updates, fp32, which holds the piece.
        start: first element within the flattened `flat`.
        numel: number of elements.
        exclusive: whether ZeRO gave the piece to this rank alone; if not, data-parallel peers hold the same one.
    """

    name: str
    shape: torch.Size
    offset: int
    flat: torch.Tensor
    start: int
    numel: int
    exclusive: bool

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This fragment's view [numel] of a tensor that is laid out like `flat`."""
        return tensor.view(-1).narrow(0, self.start, self.numel)


def fragments(named: Iterable[tuple[str, nn.Parameter]], groups: Iterable[dict]) -> list[Fragment]:
    """The fragments that this rank updates.

    Args:
        named: the rank's model parameters by canonical name.
        groups: the optimizer's parameter groups after `deepspeed.initialize`.
    """
    flats = {tensor.data_ptr(): tensor for group in groups for tensor in group["params"] if tensor.numel()}
    found = []
    for name, parameter in named:
        if not hasattr(parameter, "_hp_mapping"):
            found.append(Fragment(name, parameter.shape, 0, parameter, 0, parameter.numel(), exclusive=False))
            continue
        link = parameter._hp_mapping
        if link is None:
            continue  # another rank's
        start, numel = link.hp_fragment_address.start, link.hp_fragment_address.numel
        piece = link.hp_fragment
        flat = flats[piece.data_ptr() - start * piece.element_size()]
        found.append(Fragment(name, parameter.shape, link.lp_fragment_address.start, flat, start, numel, True))
    return found
