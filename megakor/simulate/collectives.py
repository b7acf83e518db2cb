"""What a rank says to its groups: every collective that a pass issues goes in, counts and bytes come out."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from megakor.plan.traffic import Traffic

OPERATIONS = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
}
"""PyTorch's operations: the kind, and the argument that is put in; the group is the next one."""


class CollectiveLog(TorchDispatchMode):
    """Counts the collectives of what runs inside it, on real or fake tensors.

    Args:
        axes: the axis of every group that may be used, by the group's name.
    """

    def __init__(self, axes: dict[str, str]) -> None:
        super().__init__()
        self.axes = axes
        self.counts: Counter[tuple[str, str]] = Counter()
        self.num_bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            kind, position = OPERATIONS[func.overloadpacket.__name__]
            put_in = args[position] if isinstance(args[position], list) else [args[position]]
            place = self.axes[ProcessGroup.unbox(args[position + 1]).group_name], kind
            self.counts[place] += 1
            self.num_bytes[place] += sum(tensor.nbytes for tensor in put_in)
        return func(*args, **(kwargs or {}))

    def traffic(self) -> list[Traffic]:
        """What has been counted, by axis and kind."""
        return [Traffic(*place, self.counts[place], self.num_bytes[place]) for place in sorted(self.counts)]
