from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megakor.train import replicas
from megakor.train.replicas import Difference, checksum, checksums, compare, differing, weights
from tests.ranks import run_ranks

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def flip(tensor: torch.Tensor, index: int, bit: int) -> None:
    bits = tensor.view(INTEGERS[tensor.dtype]).flatten()
    bits[index] ^= torch.tensor(1, dtype=bits.dtype) << bit


@pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)
def test_every_single_bit_counts(dtype: torch.dtype) -> None:
    tensor = torch.randn(7, 5).to(dtype)
    before = int(checksum(tensor))
    assert int(checksum(tensor.clone())) == before
    for index in range(tensor.numel()):
        for bit in range(8 * dtype.itemsize):
            flip(tensor, index, bit)
            assert int(checksum(tensor)) != before, (index, bit)
            flip(tensor, index, bit)
    assert int(checksum(tensor)) == before


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=60).filter(lambda values: len(set(values)) > 1),
    st.data(),
)
def test_order_counts(values: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(values) - 1))
    second = data.draw(st.sampled_from([i for i in range(len(values)) if values[i] != values[first]] or [first]))
    tensor = torch.tensor(values, dtype=torch.int32).view(torch.float32)
    swapped = tensor.clone()
    swapped[first], swapped[second] = tensor[second].clone(), tensor[first].clone()
    assert (int(checksum(swapped)) == int(checksum(tensor))) is (first == second)


def test_zeros_of_both_signs_and_nans_are_told_apart() -> None:
    """They compare equal, or never; their bits do not."""
    assert int(checksum(torch.tensor([0.0]))) != int(checksum(torch.tensor([-0.0])))
    assert int(checksum(torch.full((3,), torch.nan))) == int(checksum(torch.full((3,), torch.nan)))


def test_weights_are_odd_and_each_another() -> None:
    found = weights(0, 1_000_000, torch.device("cpu"))
    assert bool((found % 2 == 1).all())
    assert found.unique().numel() == found.numel()
    last = weights(2**32 - 3, 2**32, torch.device("cpu"))
    assert bool(((last > 0) & (last < 2**33)).all())


def test_the_sum_by_hand() -> None:
    """In Python's integers, which have no end."""
    tensor = torch.randn(1000)
    total = 0
    for position, bits in enumerate(tensor.view(torch.int32).tolist()):
        mixed = position * 0x9E3779B1 % 2**32
        total += bits * (2 * (mixed ^ mixed // 2**16) + 1)
    assert int(checksum(tensor)) % 2**64 == total % 2**64


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(10, 31)
    whole = int(checksum(tensor))
    for chunk in (1, 7, 309, 310, 311):
        monkeypatch.setattr(replicas, "CHUNK", chunk)
        assert int(checksum(tensor)) == whole


def test_a_view_counts_as_what_it_shows() -> None:
    tensor = torch.randn(6, 4)
    assert int(checksum(tensor.T)) == int(checksum(tensor.T.contiguous()))
    assert int(checksum(tensor.T)) != int(checksum(tensor))
    assert int(checksum(torch.empty(0))) == 0


def test_checksums_are_in_order() -> None:
    named = [("a", torch.randn(3)), ("b", torch.randn(2, 2).bfloat16()), ("c", torch.nn.Parameter(torch.randn(1)))]
    found = checksums(named)
    assert (found.dtype, found.shape) == (torch.int64, (3,))
    assert found.tolist() == [int(checksum(tensor)) for _, tensor in named]
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("sums", "ranks", "decided"),
    [
        ([5, 5, 6], (9,), True),
        ([6, 5, 5], (3,), True),
        ([5, 6, 7, 5], (4, 9), True),
        ([5, 6], (3, 4), False),
        ([5, 6, 5, 6], (3, 4, 9, 12), False),
        ([5, 6, 7], (3, 4, 9), False),
    ],
)
def test_the_vote(sums: list[int], ranks: tuple[int, ...], decided: bool) -> None:
    assert compare("w", [3, 4, 9, 12][: len(sums)], sums) == Difference("w", ranks, decided)


def parameters() -> list[tuple[str, torch.Tensor]]:
    random = np.random.default_rng(1)
    shapes = {"embed": (11, 4), "norm": (4,), "dense": (4, 8)}
    values = {name: torch.from_numpy(random.standard_normal(shape)).float() for name, shape in shapes.items()}
    return [(name, value.bfloat16() if name == "dense" else value) for name, value in values.items()]


def flipped(name: str, ranks: list[int]) -> list[Difference]:
    """What is found when one low bit of a parameter has flipped on some ranks."""
    named = parameters()
    if dist.get_rank() in ranks:
        flip(dict(named)[name], 3, 0)
    return differing(named, None)


def in_all_ways() -> list[list[Difference]]:
    last = dist.get_world_size() - 1
    own, _ = dist.new_subgroups_by_enumeration([[0], list(range(1, last + 1))])
    named = parameters()
    if dist.get_rank() == 0:
        flip(named[0][1], 0, 30)
    return [
        flipped("embed", []), flipped("embed", [last]), flipped("dense", [last]), flipped("norm", [0]),
        differing(named, own),
    ]  # fmt: skip


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_flipped_bit_is_found_and_its_rank_named(world_size: int) -> None:
    last, everyone = world_size - 1, tuple(range(world_size))
    decided = world_size > 2

    def expected(name: str, rank: int) -> list[Difference]:
        return [Difference(name, (rank,) if decided else everyone, decided)]

    for answer in run_ranks(in_all_ways, world_size):
        assert answer == [[], expected("embed", last), expected("dense", last), expected("norm", 0), []]


def test_the_words() -> None:
    assert str(Difference("w", (5,), True)) == "w: rank 5 differs from the others"
    assert str(Difference("w", (0, 1), False)) == "w: ranks 0, 1 differ, and no majority says which is right"
