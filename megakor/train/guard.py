"""What DeepSpeed's optimizers lack for a step that is not finite to change nothing.

They skip a step whose gradient norm is not finite, on every rank alike, since the norm is a sum over all ranks. But

- of parameters that tensor ranks hold whole, biases and norms, the norm counts the gradients of the first rank alone:
  another's, by a fault of its own, would go into its weights unseen (`see_all_gradients`);
- where ZeRO-1 and 2 offload, sums of gradients in fp32 are kept after a skipped step, and every later one is skipped
  too, in DeepSpeed 0.19.8 (`drop_gradients`).
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn
from torch.nn.utils import get_total_norm


def norm_of_all_groups(zero: DeepSpeedZeroOptimizer, norm_type: int = 2) -> Any:
    """The gradient norm, summed over the ranks once for all parameter groups; every rank calls.

    DeepSpeed's own sums one group after the other, and waits for ever for a stage that has fewer groups: one without
    biases and norms, such as the output projection alone.
    """
    groups = range(len(zero.bit16_groups))
    gradients = [gradient for group in groups for gradient in zero.averaged_gradients[group]]
    return zero.get_grad_norm_direct(gradients, [held for group in groups for held in zero.params_in_partition[group]])


def is_cut(parameter: nn.Parameter) -> bool:
    """Whether tensor ranks hold parts of a parameter; all of them count then."""
    return parameter.model_parallel  # type: ignore[attr-defined]


def mark(gradients: list[torch.Tensor]) -> torch.Tensor:
    """A scalar: 0, or NaN where a gradient is not finite."""
    return 0.0 * get_total_norm(gradients)


def see_all_gradients(zero: Any, parameters: list[nn.Parameter]) -> None:
    """Let DeepSpeed's norm be NaN where a gradient that it leaves out is not finite; it is the same bits otherwise.

    Takes no further collective. For tensor ranks but the first, which leaves out none.

    Args:
        zero: the engine's optimizer.
        parameters: the rank's.
    """
    if isinstance(zero, BF16_Optimizer):
        see_all_accumulated(zero)
        return
    cut = next(filter(is_cut, parameters))
    norm, norm_offloaded = zero.get_grad_norm_direct, zero.complete_grad_norm_calculation_for_cpu_offload

    def seeing(gradients: list[torch.Tensor], params: list[nn.Parameter], norm_type: int = 2) -> torch.Tensor:
        own = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        unseen = [gradient for gradient, parameter in zip(own, params, strict=False) if not is_cut(parameter)]
        return norm([mark(unseen), *own], [cut, *params], norm_type)

    def seeing_offloaded(params: list[nn.Parameter]) -> torch.Tensor:
        norms = zero.norm_for_param_grads
        if not all(torch.isfinite(value) for value in norms.values()):
            zero.norm_for_param_grads = {key: value * torch.nan for key, value in norms.items()}
        return norm_offloaded(params)

    zero.get_grad_norm_direct = seeing
    zero.complete_grad_norm_calculation_for_cpu_offload = seeing_offloaded


def see_all_accumulated(zero: BF16_Optimizer) -> None:
    """`see_all_gradients` for bf16 with ZeRO-1."""
    counted = zero.get_grads_for_norm

    def seeing(for_clipping: bool = False) -> Any:
        found = counted(for_clipping)
        if not for_clipping:
            unseen = [
                gradient
                for group, gradients in zip(zero.bf16_groups, zero.fp32_groups_gradients, strict=True)
                for parameter, gradient in zip(group, gradients, strict=True)
                if not is_cut(parameter)
            ]
            own, _ = found
            smallest = min(range(len(own)), key=lambda index: own[index].numel())
            own[smallest] = own[smallest] + mark(unseen)
        return found

    zero.get_grads_for_norm = seeing


def drop_gradients(zero: Any) -> None:
    """Forget the gradients of a skipped step."""
    if isinstance(zero, DeepSpeedZeroOptimizer):
        zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
