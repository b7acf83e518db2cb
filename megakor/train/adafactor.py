"""Adafactor (Shazeer & Stern 2018) whose factored moments do not depend on how ZeRO cuts the weights.

ZeRO hands an optimizer one flat tensor of many parameters' pieces. Stock implementations then lose the factoring and
clip all parameters as one. This one knows the fragments: it sums each matrix's squared gradients by row and column over
the ranks that share it, so every layout takes the same update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from megakor.train.fragments import Fragment


class Adafactor(torch.optim.Optimizer):
    """Adafactor with an external learning rate, without a first moment and without parameter scaling.

    State by canonical name: `exp_avg_sq_row` [rows] and `exp_avg_sq_col` [columns] of matrices, the same on every data
    rank, and `exp_avg_sq` of the rank's fragments of vectors.

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
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "num_updates": 0})
        self.eps, self.clip_threshold, self.decay_exponent = eps, clip_threshold, decay_exponent
        self.fragments: list[Fragment] = []
        self.shapes: dict[str, torch.Size] = {}
        self.device: torch.device | None = None
        self.moments: dict[str, dict[str, torch.Tensor]] = {}
        self.group: dist.ProcessGroup | None = None

    def attach(
        self,
        fragments: list[Fragment],
        shapes: dict[str, torch.Size],
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        """Tell what the flat tensors hold, and allocate the moments.

        Args:
            fragments: the rank's own pieces.
            shapes: shape of every parameter of the rank's model, in the same order on all ranks of `group`.
            group: the ranks among which the parameters are cut; None where they are whole.
            device: where the flat tensors are.
        """
        self.fragments, self.shapes, self.group, self.device = fragments, shapes, group, device

        def zeros(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.float32, device=device)

        self.moments = {}
        for name, shape in shapes.items():
            if len(shape) > 1:
                self.moments[name] = {"exp_avg_sq_row": zeros(shape[0]), "exp_avg_sq_col": zeros(shape[1])}
        for fragment in fragments:
            if len(fragment.shape) == 1:
                self.moments[fragment.name] = {"exp_avg_sq": zeros(fragment.numel)}

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
        if self.group is None or not tensors:
            return
        flat = torch.cat([tensor.view(-1) for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of the groups that `param_groups` holds now; every rank of the process group calls.

        DeepSpeed's ZeRO-1 and 2 call once for each group, with only that group in `param_groups`.
        """
        assert closure is None
        for group in self.param_groups:
            self.update(group)

    def update(self, group: dict[str, Any]) -> None:
        """One update of one parameter group."""
        group["num_updates"] += 1
        decay = 1.0 - math.pow(group["num_updates"], -self.decay_exponent)
        names = set(group["names"])
        own = [fragment for fragment in self.fragments if fragment.name in names]
        gradients = [fragment.of(fragment.flat.grad.float()) for fragment in own]  # type: ignore[union-attr]
        self.update_moments(names, own, gradients, decay)
        updates = [self.direction(*pair) for pair in zip(own, gradients, strict=True)]
        clips = self.clip_factors(group["names"], own, updates)
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
            sums[fragment.name]["exp_avg_sq_row"][first : first + len(rows)] += rows.sum(1)
            sums[fragment.name]["exp_avg_sq_col"] += rows.sum(0)
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
        row = moment["exp_avg_sq_row"][first : first + len(rows)]
        row_factor = (row / moment["exp_avg_sq_row"].mean()).rsqrt()
        scaled = rows * row_factor.unsqueeze(1) * moment["exp_avg_sq_col"].rsqrt()
        lead = fragment.offset % fragment.shape[1]
        return scaled.view(-1)[lead : lead + fragment.numel]

    def clip_factors(
        self, names: list[str], fragments: list[Fragment], updates: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """By how much each parameter's update is divided: its root mean square over the threshold, at least 1."""
        position = {name: index for index, name in enumerate(names)}
        squares = torch.zeros(len(names), dtype=torch.float32, device=self.device)
        for fragment, update in zip(fragments, updates, strict=True):
            squares[position[fragment.name]] += update.square().sum()
        self.sum_over_ranks([squares])
        sizes = torch.tensor([self.shapes[name].numel() for name in names], device=self.device)
        factors = ((squares / sizes).sqrt() / self.clip_threshold).clamp(min=1.0)
        return dict(zip(names, factors, strict=True))
