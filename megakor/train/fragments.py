"""What this rank owns of the fp32 weights and the optimizer state, by canonical name.

DeepSpeed keeps a rank's share of the fp32 master weights as flat tensors and knows where in them the piece of each
parameter lies. `fragments` reads that; checkpoints and Adafactor go by it, so both work the same for every engine and
ZeRO stage. ZeRO-0 has no flat tensors: there a fragment is a whole parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of one parameter, in row-major order, that this rank updates.

    Attributes:
        name: canonical name of the parameter.
        shape: shape of the parameter as this rank's model has it.
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


@dataclass(frozen=True)
class Flat:
    """One tensor that the optimizer updates, and the parameters that have pieces in it, on this or on other ranks."""

    tensor: torch.Tensor
    names: list[str]


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has cut the parameter itself."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The parameter's shape in this rank's model, also where ZeRO-3 has cut it."""
    return parameter.ds_shape if is_partitioned(parameter) else parameter.shape  # type: ignore[attr-defined]


def own_range(parameter: nn.Parameter) -> tuple[int, int]:
    """Where this rank's part of a ZeRO-3 parameter lies within the flattened parameter: offset, number of elements."""
    size, total = parameter.partition_numel(), parameter.ds_numel  # type: ignore[attr-defined]
    group = parameter.ds_process_group  # type: ignore[attr-defined]
    offset = min(total, size * torch.distributed.get_rank(group))
    return offset, min(size, total - offset)


def flats(zero: Any, optimizer: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]]) -> list[Flat]:
    """The tensors that the optimizer updates, in the order in which it does.

    Args:
        zero: the engine's optimizer.
        optimizer: the one that `zero` wraps.
        named: the rank's model parameters by canonical name.
    """
    if any(is_partitioned(parameter) for _, parameter in named):
        names = {id(parameter): name for name, parameter in named}
        groups = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        return [Flat(tensor, [names[id(parameter)] for parameter in group]) for tensor, group in groups]
    found = []
    for group in optimizer.param_groups:
        if len(group["params"]) == len(group["names"]):
            found += [Flat(tensor, [name]) for tensor, name in zip(group["params"], group["names"], strict=True)]
        else:
            found.append(Flat(group["params"][0], group["names"]))
    return found


def fragments(named: Iterable[tuple[str, nn.Parameter]], tensors: list[Flat], zero: Any = None) -> list[Fragment]:
    """The fragments that this rank updates.

    Args:
        named: the rank's model parameters by canonical name.
        tensors: what the optimizer updates.
        zero: the engine's optimizer, for ZeRO-3.
    """
    return list(_fragments(named, tensors, zero))


def _fragments(named: Iterable[tuple[str, nn.Parameter]], tensors: list[Flat], zero: Any) -> Iterator[Fragment]:
    by_address = {flat.tensor.data_ptr(): flat.tensor for flat in tensors if flat.tensor.numel()}
    for name, parameter in named:
        if is_partitioned(parameter):
            group, start, _ = zero.grad_position[zero.get_param_id(parameter)]
            offset, numel = own_range(parameter)
            if numel:
                yield Fragment(name, whole_shape(parameter), offset, tensors[group].tensor, start, numel, True)
        elif not hasattr(parameter, "_hp_mapping"):
            yield Fragment(name, parameter.shape, 0, parameter, 0, parameter.numel(), exclusive=False)
        elif parameter._hp_mapping is not None:  # None: another rank's
            link = parameter._hp_mapping
            start, numel = link.hp_fragment_address.start, link.hp_fragment_address.numel
            piece = link.hp_fragment
            flat = by_address[piece.data_ptr() - start * piece.element_size()]
            yield Fragment(name, parameter.shape, link.lp_fragment_address.start, flat, start, numel, True)
