"""Building a model never puts more than its shard and one layer on a rank, and ZeRO-3 holds no gathered weight."""

from __future__ import annotations

import gc
import math
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from megakor.config.schema import EngineConfig, ModelConfig, OptimizerConfig, ParallelConfig, Precision, TrainConfig
from megakor.model.specs import num_parameters, parameter_specs
from megakor.parallel.dims import ParallelDims
from megakor.parallel.tensor import gathered_linear
from megakor.train.engine import Engine
from megakor.train.values import SeededValues
from tests.distributed.runs import BF16
from tests.ranks import run_ranks
from tests.resident import give_back_freed_blocks, peak_resident_size, resident_size
from tests.train.engines import config_of, make_engine, train

MIB = 2**20
MODEL = ModelConfig(  # 448 MiB of fp32 weights; its largest parameters are the embedding and the head, 32 MiB each
    hidden_size=1024,
    num_hidden_layers=8,
    num_attention_heads=16,
    intermediate_size=4096,
    vocab_size=8192,
    rotary_pct=0.5,
)
LAYER = 4 * max(math.prod(spec.shape) for spec in parameter_specs(MODEL))
SLACK = 32 * MIB  # code that is read for the first time, small objects; 12 to 20 MiB were seen
LAYOUTS = {
    "zero3": ParallelConfig(zero_stage=3),
    "tp2": ParallelConfig(tensor_parallel_size=2),
    "pp2": ParallelConfig(pipeline_parallel_size=2),
}


class Built(Exception):
    """Ends the construction of an engine where DeepSpeed's begins."""


def growth(parallel: ParallelConfig) -> int:
    """What building this rank's model and filling its weights adds to the resident size at most, bytes."""
    train = TrainConfig(
        num_steps=1, global_batch_size=2, micro_batch_size=1, sequence_length=32, precision=Precision.fp32
    )
    config = EngineConfig(run="", parallel=parallel, train=train, optimizer=OptimizerConfig(lr=1e-3))
    dims = ParallelDims.from_config(parallel, dist.get_world_size())
    assert MODEL.vocab_size is not None
    give_back_freed_blocks()
    gc.collect()
    before = resident_size()

    def stop(**_: object) -> None:
        raise Built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "initialize", stop)
        with pytest.raises(Built):
            Engine(config, MODEL, MODEL.vocab_size, dims, SeededValues(MODEL, train.seed))
    return peak_resident_size() - before


@pytest.mark.parametrize("name", LAYOUTS)
def test_building_holds_a_shard_and_a_layer(name: str) -> None:
    shard = 4 * num_parameters(MODEL) // 2
    for rank, grown in enumerate(run_ranks(growth, 2, LAYOUTS[name])):
        assert 0.9 * shard < grown, f"rank {rank}: {grown / MIB:.0f} MiB cannot hold {shard / MIB:.0f} MiB"
        assert grown < shard + LAYER + SLACK, f"rank {rank}: {grown / MIB:.0f} MiB for {shard / MIB:.0f} MiB of weights"


def train_step_and_watch_sums() -> tuple[list[int], list[int]]:
    """Where the fp32 gradients of a bf16 run are, and where the large fp32 tensors were that were summed in a step."""
    engine = make_engine(config_of(**BF16))
    places = [flat.data_ptr() for flat in engine.engine.optimizer.fp32_groups_gradients_flat]
    summed, all_reduce = [], dist.all_reduce

    def watched(tensor: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        if tensor.numel() > 2:
            assert tensor.dtype is torch.float32
            summed.append(tensor.data_ptr())
        return all_reduce(tensor, *args, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", watched)
        train(engine, 1)
    return places, summed


def test_replicas_gradients_are_summed_in_fp32_where_they_are() -> None:
    for places, summed in run_ranks(train_step_and_watch_sums, 2):
        assert sorted(summed) == sorted(places)


@pytest.mark.parametrize("biased", [False, True])
def test_gathered_linear_is_linear(biased: bool) -> None:
    torch.manual_seed(0)
    states, weight, bias = torch.randn(2, 5, 16), torch.randn(24, 16), torch.randn(24) if biased else None
    results = []
    for product in (functional.linear, gathered_linear):
        leaves = [tensor.clone().requires_grad_() for tensor in (states, weight, bias) if tensor is not None]
        output = product(*leaves)
        output.square().sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert torch.equal(ours, theirs)


def test_gathered_linear_takes_the_weight_as_it_is_gathered_again() -> None:
    weight, states = torch.nn.Parameter(torch.ones(3, 2)), torch.ones(1, 2, requires_grad=True)
    output = gathered_linear(states, weight)
    weight.data = torch.empty(0)  # as ZeRO-3 does between the passes
    weight.data = torch.full((3, 2), 5.0)
    output.sum().backward()
    assert states.grad is not None
    assert states.grad.tolist() == [[15.0, 15.0]], "a copy of the weight was held since the forward pass"
