"""Adafactor (Shazeer & Stern 2018) whose factored moments do not depend on how ZeRO cuts the weights.

ZeRO hands an optimizer one flat tensor of many parameters' pieces. Stock implementations then lose the factoring and
clip all parameters as one. This one knows the fragments: it sums each matrix's squared gradients by row and column over
the ranks that share it, ZeRO's and tensor ranks alike, so every layout takes the same update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megakor.model.specs import WHOLE, Shard
from megakor.train.fragments import Flat, Fragment


@dataclass(frozen=True)
class Sharing:
    """How the parameters of a rank's model are cut over ranks.

    Attributes:
        shapes: whole shape of every parameter, in the same order on all ranks that share parameters.
        shards: this rank's tensor shard of each; parameters left out are whole.
        replicas: the ranks over which ZeRO cuts; None where parameters are whole.
        tensor: the tensor ranks; None where there is one.
    """

    shapes: dict[str, torch.Size]
    shards: dict[str, Shard] = field(default_factory=dict)
    replicas: dist.ProcessGroup | None = None
    tensor: dist.ProcessGroup | None = None

    def shard(self, name: str) -> Shard:
        return self.shards.get(name, WHOLE)

    def counts(self, name: str) -> bool:
        """Whether this rank's part counts in a sum over tensor ranks: of what all hold whole, the first one's does."""
        return self.tensor is None or self.shard(name).count > 1 or dist.get_rank(self.tensor) == 0


class Adafactor(torch.optim.Optimizer):
    """Adafactor with an external learning rate, without a first moment and without parameter scaling.

    State by canonical name: `exp_avg_sq_row` [rows] and `exp_avg_sq_col` [columns] of whole matrices, the same on every
    rank that shares the matrix, and `exp_avg_sq` of the rank's fragments of vectors.

    Args:
        params: parameter groups, each with the canonical `names` of its parameters, in the same order on all ranks;
            `weight_decay` is decoupled and read from each.
        lr: learning rate.
        eps: added to the squared gradient.
        clip_threshold: largest root mean square of a parameter's update, in units of the rate.
        decay_exponent: the second moment's decay at step t is 1 - t^-decay_exponent.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        eps: float = 1e-30,
        clip_threshold: float = 1.0,
        decay_exponent: float = 0.8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.eps, self.clip_threshold, self.decay_exponent = eps, clip_threshold, decay_exponent
        self.fragments: list[Fragment] = []
        self.names: dict[int, list[str]] = {}
        self.updates: dict[int, int] = {}
        self.moments: dict[str, dict[str, torch.Tensor]] = {}
        self.sharing = Sharing({})

    @property
    def steps(self) -> int:
        """Updates done."""
        return next(iter(self.updates.values()))

    def attach(self, fragments: list[Fragment], tensors: list[Flat], num_updates: int, sharing: Sharing) -> None:
        """Tell what the flat tensors hold, and allocate the moments.

        Args:
            fragments: the rank's own pieces.
            tensors: every flat tensor, in the same order on all ranks that share parameters.
            num_updates: updates done.
            sharing: how parameters are cut.
        """
        self.fragments, self.sharing = fragments, sharing
        self.names = {id(flat.tensor): flat.names for flat in tensors}
        self.updates = {id(flat.tensor): num_updates for flat in tensors}
        self.moments = {}
        for flat in tensors:
            for name in flat.names:
                shape = sharing.shapes[name]
                if len(shape) > 1:
                    self.moments[name] = {
                        "exp_avg_sq_row": torch.zeros(shape[0], device=flat.tensor.device),
                        "exp_avg_sq_col": torch.zeros(shape[1], device=flat.tensor.device),
                    }
        for fragment in fragments:
            if len(fragment.shape) == 1:
                self.moments[fragment.name] = {"exp_avg_sq": torch.zeros(fragment.numel, device=fragment.flat.device)}

    def window(self, fragment: Fragment, first_row: int, num_rows: int) -> dict[str, slice]:
        """The elements of a matrix's row and column moments that rows of a fragment belong to."""
        shard, (rows, columns) = self.sharing.shard(fragment.name), fragment.shape
        first_row += shard.index * rows if shard.dim == 0 else 0
        first_column = shard.index * columns if shard.dim == 1 else 0
        return {
            "exp_avg_sq_row": slice(first_row, first_row + num_rows),
            "exp_avg_sq_col": slice(first_column, first_column + columns),
        }

    @staticmethod
    def as_rows(fragment: Fragment, values: torch.Tensor) -> tuple[int, torch.Tensor]:
        """The first row that a fragment of a matrix touches, and its values [rows, columns] padded with zeros."""
        columns = fragment.shape[1]
        lead = fragment.offset % columns
        padded = values.new_zeros(-(-(lead + fragment.numel) // columns) * columns)
        padded[lead : lead + fragment.numel] = values
        return fragment.offset // columns, padded.view(-1, columns)

    def sum_over_ranks(self, tensors: list[torch.Tensor]) -> None:
        """Add the tensors up over the ranks that share the parameters, in one collective."""
        if not tensors:
            return
        flat = torch.cat([tensor.view(-1) for tensor in tensors])
        for group in (self.sharing.replicas, self.sharing.tensor):
            if group is not None:
                dist.all_reduce(flat, group=group)
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of the tensors that `param_groups` holds now and that have a gradient; every rank of the process
        group calls, and all have gradients or none.

        DeepSpeed calls once for each flat tensor, with only that one in `param_groups`; and while it sets up, before
        the tensors are attached, when nothing may change.
        """
        assert closure is None
        for group in self.param_groups:
            for tensor in group["params"]:
                if id(tensor) in self.updates and tensor.grad is not None:
                    self.update(group, tensor)

    def update(self, group: dict[str, Any], tensor: torch.Tensor) -> None:
        """One update of one flat tensor."""
        self.updates[id(tensor)] += 1
        decay = 1.0 - math.pow(self.updates[id(tensor)], -self.decay_exponent)
        names = self.names[id(tensor)]
        own = [fragment for fragment in self.fragments if fragment.flat is tensor]
        gradients = [fragment.of(fragment.flat.grad.float()) for fragment in own]  # type: ignore[union-attr]
        self.update_moments(set(names), own, gradients, decay)
        updates = [self.direction(*pair) for pair in zip(own, gradients, strict=True)]
        clips = self.clip_factors(names, own, updates, tensor.device)
        for fragment, update in zip(own, updates, strict=True):
            weights = fragment.of(fragment.flat.data)
            weights.mul_(1.0 - group["lr"] * group["weight_decay"])
            weights.sub_(update * (group["lr"] / clips[fragment.name]))

    def update_moments(
        self, names: set[str], fragments: list[Fragment], gradients: list[torch.Tensor], decay: float
    ) -> None:
        """Mix the squared gradients into the moments: row and column means of matrices, elements of vectors."""
        matrices = {name: m for name, m in self.moments.items() if name in names and "exp_avg_sq_row" in m}
        sums = {name: {key: torch.zeros_like(value) for key, value in m.items()} for name, m in matrices.items()}
        for fragment, gradient in zip(fragments, gradients, strict=True):
            squared = gradient.square() + self.eps
            if fragment.name not in sums:
                self.moments[fragment.name]["exp_avg_sq"].lerp_(squared, 1.0 - decay)
                continue
            first, rows = self.as_rows(fragment, squared)
            window = self.window(fragment, first, len(rows))
            if self.sharing.counts(fragment.name):
                for dim, key in ((1, "exp_avg_sq_row"), (0, "exp_avg_sq_col")):
                    sums[fragment.name][key][window[key]] += rows.sum(dim)
        self.sum_over_ranks([tensor for entry in sums.values() for tensor in entry.values()])
        for name, entry in sums.items():
            row, column = entry["exp_avg_sq_row"], entry["exp_avg_sq_col"]
            matrices[name]["exp_avg_sq_row"].lerp_(row / column.numel(), 1.0 - decay)
            matrices[name]["exp_avg_sq_col"].lerp_(column / row.numel(), 1.0 - decay)

    def direction(self, fragment: Fragment, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient over the root of its second moment, [numel]."""
        moment = self.moments[fragment.name]
        if "exp_avg_sq" in moment:
            return gradient * moment["exp_avg_sq"].rsqrt()
        first, rows = self.as_rows(fragment, gradient)
        window = self.window(fragment, first, len(rows))
        row, column = (moment[key][window[key]] for key in ("exp_avg_sq_row", "exp_avg_sq_col"))
        row_factor = (row / moment["exp_avg_sq_row"].mean()).rsqrt()
        scaled = rows * row_factor.unsqueeze(1) * column.rsqrt()
        lead = fragment.offset % fragment.shape[1]
        return scaled.view(-1)[lead : lead + fragment.numel]

    def clip_factors(
        self, names: list[str], fragments: list[Fragment], updates: list[torch.Tensor], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """By how much each parameter's update is divided: its root mean square over the threshold, at least 1."""
        position = {name: index for index, name in enumerate(names)}
        squares = torch.zeros(len(names), dtype=torch.float32, device=device)
        for fragment, update in zip(fragments, updates, strict=True):
            if self.sharing.counts(fragment.name):
                squares[position[fragment.name]] += update.square().sum()
        self.sum_over_ranks([squares])
        sizes = torch.tensor([math.prod(self.sharing.shapes[name]) for name in names], device=device)
        factors = ((squares / sizes).sqrt() / self.clip_threshold).clamp(min=1.0)
        return dict(zip(names, factors, strict=True))
