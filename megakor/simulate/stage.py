"""One rank of a layout: its model is built by pretrain's own factory, and one micro-batch goes through it.

    fake group ─► build ─► forward, backward ─► parameters, collectives, memory, what it sends on

Weights and activations are fake tensors: they have shapes and types and take no memory.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megakor.config.schema import EngineConfig, ModelConfig
from megakor.parallel.build import Built, build
from megakor.parallel.chunks import ACCELERATOR_LOSS_CHUNK
from megakor.parallel.dims import ParallelDims
from megakor.parallel.groups import Groups
from megakor.plan.traffic import Traffic
from megakor.simulate.collectives import CollectiveLog
from megakor.simulate.memory import LiveMemory
from megakor.simulate.synchronisation import no_synchronisation
from megakor.train.device import (
    DTYPES,
    device,
    end_process_group,
    start_fake_process_group,
)


@dataclass(frozen=True)
class Part:
    """One parameter of a rank.

    Attributes:
        name: canonical name.
        numel: elements that the rank holds.
        count: tensor ranks that hold other parts of it; 1: all of them hold the whole.
        tied_elsewhere: whether it is counted with another stage.
    """

    name: str
    numel: int
    count: int
    tied_elsewhere: bool


@dataclass(frozen=True)
class Pass:
    """One micro-batch's way through a rank.

    Attributes:
        parts: the rank's parameters.
        traffic: its collectives in forward and backward.
        kept: bytes that stay from the forward pass until the backward pass.
        peak: the most bytes at once, the rank's buffers for pipeline neighbours included.
        border: bytes of the hidden states that cross a border of stages, and of the gradients that come back.
    """

    parts: list[Part]
    traffic: list[Traffic]
    kept: int
    peak: int
    border: int


@contextmanager
def fake_rank(rank: int, dims: ParallelDims) -> Iterator[Groups]:
    """Inside, this process is a rank of a layout whose other ranks do not exist, and tensors are fake."""
    start_fake_process_group(rank, dims.world_size)
    try:
        with FakeTensorMode():
            yield Groups.create(dims)
    finally:
        end_process_group()


def build_quietly(config: EngineConfig, model: ModelConfig, num_tokens: int, groups: Groups) -> Built:
    """The rank's model. DeepSpeed prints what it makes of every stage, and moves the weights to the device that they
    are on, which fake ones do not survive in PyTorch 2.13."""
    dtype = DTYPES[config.train.precision]
    stays = mock.patch.object(nn.Module, "to", lambda module, *_, **__: module)
    with redirect_stdout(io.StringIO()), stays:
        return build(config, model, num_tokens, groups, dtype, device(), ACCELERATOR_LOSS_CHUNK)


def run_pass(config: EngineConfig, model: ModelConfig, built: Built, groups: Groups) -> Pass:
    """Forward and backward of one micro-batch, amid what DeepSpeed's pipeline holds besides.

    That is a buffer for what neighbours send and a copy of it for each micro-batch; on the last stage the logits of the
    micro-batch before, which stay until a third one takes their place.
    """
    dims, position = groups.dims, groups.position("pipeline")
    first, last, pipelined = position == 0, position == dims.pipeline - 1, dims.pipeline > 1
    batch, length = config.train.micro_batch_size, config.train.sequence_length // dims.context
    stream = (batch, length // dims.tensor if dims.sequence_parallel else length, model.hidden_size)
    assert model.vocab_size is not None
    columns, dtype = model.vocab_size // dims.tensor, DTYPES[config.train.precision]
    for _, parameter in built.named:  # the engine adds each gradient to its fp32 sum at once
        parameter.register_post_accumulate_grad_hook(drop_gradient)
    log = CollectiveLog({groups.tensor.group_name: "tensor", groups.context.group_name: "context"})
    memory = LiveMemory(parameter for _, parameter in built.named)
    with memory, log, no_synchronisation(f"stage {position}"):
        received = None if first else torch.zeros(stream, dtype=dtype)
        gradient = None if last else torch.zeros(stream, dtype=dtype)
        earlier_logits = torch.zeros(batch, length, columns, dtype=dtype) if last and pipelined else None
        before = memory.live
        inputs = torch.zeros(batch, length, dtype=torch.long) if received is None else received.clone().requires_grad_()
        output = built.module(inputs.clone() if pipelined else inputs)
        result = output
        assert last or output.shape == stream
        if last:
            labels = (torch.zeros(batch, length, dtype=torch.long), torch.ones(batch, length), torch.ones(()))
            result = built.loss(output, labels)
        if not pipelined:
            del output  # the plain engine holds the loss alone
        kept = memory.live - before
        result.backward(gradient)
        del earlier_logits
    border = math.prod(stream) * dtype.itemsize
    parts = [
        Part(name, parameter.numel(), built.held[name].shard.count, built.held[name].tied_elsewhere)
        for name, parameter in built.named
    ]
    return Pass(parts, log.traffic(), kept, memory.peak, border)


def drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None
