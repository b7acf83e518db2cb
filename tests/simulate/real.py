"""A real step on gloo ranks, watched: what the ranks say to each other and keep is what a simulation must equal."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

from megakor.config.schema import PretrainConfig
from megakor.data.stream import Batch
from megakor.parallel import build as building
from megakor.parallel.dims import ParallelDims
from megakor.train.engine import Engine
from megakor.train.values import SeededValues

KINDS = {
    "all_reduce": ("all_reduce", "tensor"),
    "all_gather_into_tensor": ("all_gather", "input_tensor"),
    "reduce_scatter_tensor": ("reduce_scatter", "input"),
    "all_to_all_single": ("all_to_all", "input"),
    "send": ("send", "tensor"),
}
"""Functions of `torch.distributed`: their kind, and the argument that the calling rank puts in."""


@dataclass
class Seen:
    """What one rank was seen to do in one step.

    Attributes:
        calls: how many, by a group's ranks or a receiver's and the kind.
        sizes: the same, bytes put in.
        kept: bytes that the first micro-batch left for its backward pass.
        saved: those of them that autograd saved.
        most_saved: the most bytes that were saved of all micro-batches at once.
        weights: bytes of the model; and of DeepSpeed's fp32 gradients (0 where it has no flat ones), and of masters and
            moments.
    """

    calls: Counter = field(default_factory=Counter)
    sizes: Counter = field(default_factory=Counter)
    kept: int = 0
    saved: int = 0
    most_saved: int = 0
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0


class Saved:
    """The storages that autograd saves, parameters left out: those alive, and those of the first micro-batch."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.alive, self.first, self.most = WeakIdKeyDictionary(), {}, 0
        self.micro_batch = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.alive[storage] = storage.nbytes()
            self.most = max(self.most, sum(self.alive.values()))
            if self.micro_batch == 1:
                self.first[storage.data_ptr()] = storage.nbytes()
        return tensor


@contextmanager
def listening(seen: Seen) -> Iterator[None]:
    """Inside, every call of `torch.distributed` is written down, scalars and metadata left out."""
    real = {name: getattr(dist, name) for name in KINDS}
    backend = deepspeed.comm.comm.cdb

    def heard(name: str) -> Callable:
        kind, put_in = KINDS[name]
        signature = inspect.signature(real[name])

        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            tensor = given[put_in]
            among = given["dst"] if name == "send" else tuple(dist.get_process_group_ranks(given.get("group")))
            if tensor.numel() > 2 and tensor.is_floating_point():
                seen.calls[among, kind] += 1
                seen.sizes[among, kind] += tensor.numel() * tensor.element_size()
            return real[name](*args, **kwargs)

        return call

    for name in KINDS:
        setattr(dist, name, heard(name))
    backend.all_gather_function, backend.reduce_scatter_function = (
        dist.all_gather_into_tensor,
        dist.reduce_scatter_tensor,
    )
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(dist, name, function)
        backend.all_gather_function = dist.all_gather_into_tensor
        backend.reduce_scatter_function = dist.reduce_scatter_tensor


def watched_step(config: PretrainConfig) -> Seen:
    """One step of the real engine on this rank, on made-up tokens."""
    dims = ParallelDims.from_config(config.parallel, dist.get_world_size())
    engine = Engine(config, config.model, config.model.vocab_size, dims, SeededValues(config.model, 1))
    module, seen = engine.built.module, Seen()
    saved = Saved(list(module.parameters()))
    real_forward, real_loss = module.forward, building.vocabulary_loss
    last = dims.pipeline_rank(dist.get_rank()) == dims.pipeline - 1

    def measure(*held: torch.Tensor) -> None:
        """What the first micro-batch keeps: what autograd saved, and what the engine holds."""
        if saved.micro_batch == 1:
            seen.saved = sum(saved.first.values())
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
            seen.kept = sum((saved.first | storages).values())

    def buffered(name: str) -> list[torch.Tensor]:
        found = engine.engine.pipe_buffers[name][0] if engine.pipelined else None
        return list(found) if isinstance(found, tuple) else [] if found is None else [found]

    def forward(input_ids: torch.Tensor) -> torch.Tensor:
        saved.micro_batch += 1
        output = real_forward(input_ids)
        held = [*buffered("inputs"), output] if engine.pipelined else [input_ids]
        if not last:
            measure(*held)
        forward.held = held  # type: ignore[attr-defined]
        return output

    def loss(
        logits: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor, scale: torch.Tensor, shard: Any
    ) -> Any:
        result = real_loss(logits, labels, loss_mask, scale, shard)
        measure(*forward.held, labels, loss_mask, scale, result)  # type: ignore[attr-defined]
        return result

    module.forward, building.vocabulary_loss = forward, loss
    train = config.train
    shape = (train.micro_batch_size, train.sequence_length)
    ids = np.arange(shape[0] * shape[1]).reshape(shape) % config.model.vocab_size
    batch = Batch(ids, ids.copy(), np.ones(shape, np.float32), train.global_batch_size * train.sequence_length)
    try:
        with listening(seen), saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            engine.train_step([batch] * engine.num_micro_batches, 1e-3, 0)
    finally:
        building.vocabulary_loss = real_loss
    seen.most_saved = saved.most
    seen.weights = sum(parameter.nbytes for parameter in module.parameters())
    seen.gradients = sum(flat.nbytes for flat in getattr(engine.engine.optimizer, "fp32_groups_gradients_flat", []))
    masters = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    moments = [value for state in engine.optimizer.state.values() for value in state.values() if value.dim()]
    seen.optimizer = sum(tensor.nbytes for tensor in (*masters, *moments))
    return seen


def watched_steps(configs: list[PretrainConfig]) -> list[Seen]:
    return [watched_step(config) for config in configs]
