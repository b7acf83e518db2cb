"""The optimizer: parameter groups by canonical name, and its state as named pieces.

A `Piece` is what checkpoints read and write: a named 1-D part of a parameter's fp32 weights or of its optimizer state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from megakor.config.schema import OptimizerConfig, OptimizerName
from megakor.model.parameters import ParameterSpec
from megakor.train.adafactor import Adafactor
from megakor.train.fragments import Fragment

WEIGHT = "weight"


@dataclass(frozen=True)
class Piece:
    """A contiguous part of one named state tensor.

    Attributes:
        state: `weight` or the optimizer's name of the state.
        name: canonical name of the parameter.
        shape: shape of the whole state tensor.
        offset: first element within the flattened state tensor.
        values: the rank's live fp32 storage [numel]; loading writes into it.
        writes: whether this rank saves it; exactly one rank saves each element.
    """

    state: str
    name: str
    shape: tuple[int, ...]
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
    optimizer: torch.optim.Optimizer, fragments: list[Fragment], first_replica: bool, replicated: set[str]
) -> list[Piece]:
    """The fp32 weights and the optimizer state that this rank holds.

    Args:
        optimizer: built by `build_optimizer`, its state prepared.
        fragments: the rank's own pieces of the parameters.
        first_replica: whether this rank is the first of its data-parallel peers, which saves what all of them hold.
        replicated: parameters that another pipeline stage saves (tied embeddings).
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
        writes = (fragment.exclusive or first_replica) and fragment.name not in replicated
        for key, values in states.items():
            pieces.append(Piece(key, fragment.name, tuple(fragment.shape), fragment.offset, values, writes))
    if isinstance(optimizer, Adafactor):
        for name, moment in optimizer.moments.items():
            for key in moment.keys() - {"exp_avg_sq"}:
                writes = first_replica and name not in replicated
                pieces.append(Piece(key, name, tuple(moment[key].shape), 0, moment[key], writes))
    return pieces


def prepare_state(
    optimizer: torch.optim.Optimizer,
    fragments: list[Fragment],
    shapes: dict[str, torch.Size],
    group: dist.ProcessGroup | None,
    device: torch.device,
    num_updates: int,
) -> None:
    """Make the optimizer's state exist, zeroed, as after `num_updates` updates; the pieces then let a load fill it."""
    if isinstance(optimizer, Adafactor):
        optimizer.attach(fragments, shapes, group, device)
        for param_group in optimizer.param_groups:
            param_group["num_updates"] = num_updates
        return
    for param_group in optimizer.param_groups:
        for tensor in param_group["params"]:
            optimizer.state[tensor] = {
                "step": torch.tensor(float(num_updates), dtype=torch.float32, device=tensor.device),
                "exp_avg": torch.zeros_like(tensor),
                "exp_avg_sq": torch.zeros_like(tensor),
            }


def optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """Updates done; fewer than the run's steps where fp16 overflowed and steps were skipped."""
    if isinstance(optimizer, Adafactor):
        return optimizer.param_groups[0]["num_updates"]
    return int(next(iter(optimizer.state.values()))["step"])
