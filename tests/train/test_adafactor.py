"""Our Adafactor against transformers' on whole parameters, and against itself however the parameters are cut."""

from __future__ import annotations

import pytest
import torch
from transformers.optimization import Adafactor as Theirs

from megakor.train.adafactor import Adafactor, Sharing
from megakor.train.fragments import Flat, Fragment
from tests.ranks import run_ranks
from tests.train.adafactor_cuts import (
    NUM_STEPS,
    SHAPES,
    WEIGHT_DECAY,
    Cut,
    gradients,
    random_cuts,
    rate,
    sharded_cuts,
    starts,
    together,
    train,
    train_all,
    train_sharded,
    whole_cuts,
    zero_cuts,
)


def theirs() -> dict[str, torch.Tensor]:
    parameters = {name: torch.nn.Parameter(value) for name, value in starts().items()}
    groups = [
        {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = Theirs(groups, lr=0.0, clip_threshold=1.0, scale_parameter=False, relative_step=False)
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        for name, gradient in gradients(step).items():
            parameters[name].grad = gradient
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name in SHAPES:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-6, atol=2e-6)


def test_whole_parameters_as_transformers_has_them() -> None:
    ours = together([train(whole_cuts(), 0, None)])
    assert_same(ours, theirs())
    assert min((ours[name] - value).abs().max().item() for name, value in starts().items()) > 1e-3  # it moved


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_cut_takes_the_same_steps(world_size: int) -> None:
    variants = [zero_cuts(world_size), *(random_cuts(world_size, seed) for seed in range(3))]
    variants.append([Cut(0, cut.name, cut.offset, cut.numel) for cut in whole_cuts()])  # a rank without a piece
    ranks = run_ranks(train_all, world_size, variants)
    expected = together([train(whole_cuts(), 0, None)])
    for index in range(len(variants)):
        assert_same(together([rank[index] for rank in ranks]), expected)


@pytest.mark.parametrize(("tensor", "replicas"), [(2, 2), (4, 1)])
def test_any_shards_take_the_same_steps(tensor: int, replicas: int) -> None:
    variants = [sharded_cuts(tensor, replicas, seed) for seed in range(4)]
    assert {cut.shard.dim for cuts in variants for cut in cuts if cut.shard.count > 1} == {0, 1}
    ranks = run_ranks(train_sharded, tensor * replicas, tensor, variants)
    expected = together([train(whole_cuts(), 0, None)])
    for index in range(len(variants)):
        for first in range(tensor):  # each tensor rank's own copy of what all of them hold
            others = [rank for rank in range(tensor * replicas) if rank % tensor != first]
            order = [*others, *range(first, tensor * replicas, tensor)]
            assert_same(together([ranks[rank][index] for rank in order]), expected)


def test_moments_are_those_of_the_whole() -> None:
    """Row and column moments hold the decayed means of all squared gradients, wherever they were computed."""
    parameter = torch.nn.Parameter(torch.zeros(6))
    optimizer = Adafactor([{"params": [parameter], "names": ["m"]}], lr=0.1)
    shape = torch.Size([2, 3])
    fragment = Fragment("m", shape, 0, parameter, 0, 6, False)
    optimizer.attach([fragment], [Flat(parameter, ["m"])], 0, Sharing({"m": shape}))
    first, second = torch.tensor([[1.0, 2.0, 3.0], [0.0, 4.0, 1.0]]), torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 5.0]])
    for gradient in (first, second):
        parameter.grad = gradient.view(-1)
        optimizer.step()
    decay = 1 - 2**-0.8
    squared = decay * first.square() + (1 - decay) * second.square()
    torch.testing.assert_close(optimizer.moments["m"]["exp_avg_sq_row"], squared.mean(1))
    torch.testing.assert_close(optimizer.moments["m"]["exp_avg_sq_col"], squared.mean(0))
    assert optimizer.steps == 2
