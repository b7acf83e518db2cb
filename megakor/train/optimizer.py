"""The optimizer: parameter groups by canonical name, and its state as named pieces.

A `Piece` is what checkpoints read and write: a named 1-D part of a parameter's fp32 weights or of its optimizer state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from megakor.checkpoint.format import WEIGHT
from megakor.config.schema import OptimizerConfig, OptimizerName
from megakor.model.specs import WHOLE, ParameterSpec, Shard
from megakor.parallel.build import Held
from megakor.train.adafactor import Adafactor, Sharing
from megakor.train.fragments import Flat, Fragment


@dataclass(frozen=True)
class Piece:
    """A contiguous part of one named state tensor.

    Attributes:
        state: `weight` or the optimizer's name of the state.
        name: canonical name of the parameter.
        shape: shape of the whole state tensor.
        shard: the tensor rank's shard of it that this model has.
        offset: first element within the flattened shard.
        values: the rank's live fp32 storage [numel]; loading writes into it.
        writes: whether this rank saves it; exactly one rank saves each element.
    """

    state: str
    name: str
    shape: tuple[int, ...]
    shard: Shard
    offset: int
    values: torch.Tensor
    writes: bool


def build_optimizer(
    config: OptimizerConfig, named: list[tuple[str, nn.Parameter]], specs: dict[str, ParameterSpec]
) -> torch.optim.Optimizer:
    """The optimizer over a rank's parameters: matrices decay, biases and norms do not."""
    groups = []
    for decays in (True, False):
        chosen = [(name, parameter) for name, parameter in named if specs[name].decays is decays]
        if chosen:
            group = {"params": [parameter for _, parameter in chosen], "names": [name for name, _ in chosen]}
            groups.append({**group, "weight_decay": config.weight_decay if decays else 0.0})
    if config.name is OptimizerName.adafactor:
        return Adafactor(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def optimizer_pieces(
    optimizer: torch.optim.Optimizer, fragments: list[Fragment], held: dict[str, Held], first: bool, first_tensor: bool
) -> list[Piece]:
    """The fp32 weights and the optimizer state that this rank holds.

    Args:
        optimizer: built by `build_optimizer`, its state prepared.
        fragments: the rank's own pieces of the parameters.
        held: the rank's parameters by name.
        first: whether this rank is the first of its replicas, which saves what all of them hold.
        first_tensor: whether it is the first of its tensor ranks too, which saves what those all hold.
    """
    pieces = []
    for fragment in fragments:
        states = {WEIGHT: fragment.of(fragment.flat.data)}
        if isinstance(optimizer, Adafactor):
            moment = optimizer.moments[fragment.name]
            states |= {key: value for key, value in moment.items() if key == "exp_avg_sq"}
        else:
            state = optimizer.state[fragment.flat]
            states |= {key: fragment.of(value) for key, value in state.items() if value.shape == fragment.flat.shape}
        own = held[fragment.name]
        writes = (fragment.exclusive or first) and not own.saved_elsewhere
        for key, values in states.items():
            pieces.append(Piece(key, fragment.name, own.spec.shape, own.shard, fragment.offset, values, writes))
    if isinstance(optimizer, Adafactor):
        for name, moment in optimizer.moments.items():
            for key in sorted(moment.keys() - {"exp_avg_sq"}):  # whole on every rank that has the parameter
                writes = first and first_tensor and not held[name].tied_elsewhere
                pieces.append(Piece(key, name, tuple(moment[key].shape), WHOLE, 0, moment[key], writes))
    return pieces


def prepare_state(
    optimizer: torch.optim.Optimizer, fragments: list[Fragment], tensors: list[Flat], num_updates: int, sharing: Sharing
) -> None:
    """Make the optimizer's state exist, zeroed, as after `num_updates` updates; the pieces then let a load fill it.

    Args:
        tensors: what the optimizer updates.
        sharing: how the parameters are cut over ranks; for Adafactor.
    """
    if isinstance(optimizer, Adafactor):
        return optimizer.attach(fragments, tensors, num_updates, sharing)
    for flat in tensors:
        optimizer.state[flat.tensor] = {
            "step": torch.tensor(float(num_updates), dtype=torch.float32, device=flat.tensor.device),
            "exp_avg": torch.zeros_like(flat.tensor, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(flat.tensor, requires_grad=False),
        }


def optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """Updates made; fewer than the run's steps where some were skipped."""
    if isinstance(optimizer, Adafactor):
        return optimizer.steps
    return int(next(iter(optimizer.state.values()))["step"])


def set_optimizer_steps(optimizer: torch.optim.Optimizer, num_updates: int) -> None:
    """As after so many updates."""
    if isinstance(optimizer, Adafactor):
        optimizer.updates = dict.fromkeys(optimizer.updates, num_updates)
        return
    for state in optimizer.state.values():
        state["step"].fill_(num_updates)
