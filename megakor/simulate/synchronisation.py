"""Refuses passes that wait for the device: those whose course depends on the values of a tensor.

Fake tensors have none. `.item()`, a condition on a tensor, `nonzero`, reading by a boolean mask and the like raise on
them. Writing by a boolean mask does not, and is looked for here. A copy to the host is not seen.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

BELOW = (Path(torch.__file__).parent, Path(__file__).parent)
"""Folders whose frames lie below the line that is to blame."""


class _MaskedWrites(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default):
            indices, values = args[1], args[2]
            masked = any(index is not None and index.dtype is torch.bool for index in indices)
            if masked and values.numel() > 1:  # with one value it is a fill, which waits for nothing
                raise DynamicOutputShapeException(func)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_synchronisation(where: str) -> Iterator[None]:
    """Inside, on fake tensors, an operation that would wait for the device raises `ValueError` with its line.

    Args:
        where: what is being run, for the error.
    """
    try:
        with _MaskedWrites():
            yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next(f for f in reversed(frames) if not any(Path(f.filename).is_relative_to(b) for b in BELOW))
        raise ValueError(
            f"{where}: {line.filename}:{line.lineno} in {line.name}: `{line.line}` must not depend on the values of a "
            f"tensor ({error.func}): the step would wait for the device"
        ) from error
