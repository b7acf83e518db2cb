"""The memory of what a pass makes: tensors go in as operations return them, bytes alive and their peak come out."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Follows every storage that is made inside it until it is freed; views of one storage count once.

    What a kernel allocates for itself while it runs is not seen.

    Args:
        before: tensors that were there already; they do not count.

    Attributes:
        live: bytes alive now.
        peak: the most bytes that were alive at once.
    """

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.storages: dict[int, weakref.ref] = {}
        for tensor in before:
            self._follow(tensor, counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf)
        return result

    def _follow(self, tensor: torch.Tensor, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        address, num_bytes = storage._cdata, storage.nbytes() if counted else 0
        if address in self.storages:
            return

        def freed(_: weakref.ref) -> None:
            del self.storages[address]
            self.live -= num_bytes

        self.storages[address] = weakref.ref(storage, freed)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
