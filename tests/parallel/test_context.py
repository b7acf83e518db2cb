"""Context ranks: the exchange between sequence and heads, against DeepSpeed's Ulysses and against one rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention

from megakor.model.gpt_neox import Attention, GPTNeoX, GPTNeoXForCausalLM, Parts
from megakor.model.layers import Layers, WholeLayers
from megakor.model.specs import parameter_specs
from megakor.parallel.context import exchange, own_part
from megakor.parallel.dims import ParallelDims
from megakor.parallel.groups import Groups
from megakor.parallel.layers import ShardedLayers
from tests.model.configs import small
from tests.parallel.shards import Piece, Tensors, value
from tests.ranks import run_ranks

BATCH, SEQ, HEADS, DIM = 2, 12, 4, 6
SIZES = (2, 4)


def run_exchange(group: dist.ProcessGroup) -> Tensors:
    """Both ways of the exchange, with gradients that differ everywhere."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    whole = value("states", BATCH, SEQ, HEADS, DIM)
    part = whole.chunk(size, 1)[rank].clone().requires_grad_()
    heads = exchange(part, group, to_heads=True)
    (heads * value("at the heads", BATCH, SEQ, HEADS, DIM).chunk(size, 2)[rank]).sum().backward()
    of_heads = whole.chunk(size, 2)[rank].clone().requires_grad_()
    back = exchange(of_heads, group, to_heads=False)
    (back * value("at the sequence", BATCH, SEQ, HEADS, DIM).chunk(size, 1)[rank]).sum().backward()
    assert part.grad is not None
    assert of_heads.grad is not None
    return {
        "heads": heads.detach(),
        "heads gradient": part.grad,
        "back": back.detach(),
        "back gradient": of_heads.grad,
        "there and back": exchange(exchange(part, group, to_heads=True), group, to_heads=False).detach(),
    }


CONFIG = small(hidden_size=HEADS * DIM, num_attention_heads=HEADS, rotary_pct=0.7)


def run_attention(layers: Layers, part: torch.Tensor, direction: torch.Tensor) -> Tensors:
    """Attention over fused queries, keys and values [batch, seq of this rank, heads, 3 × dim]."""
    attention = Attention(CONFIG, Parts(layers))
    fused = part.clone().requires_grad_()
    context = layers.attend(lambda states: attention.attend(states, None), fused)
    (context * direction).sum().backward()
    return {"output": context.detach(), "gradient": fused.grad}  # type: ignore[dict-item]


class LocalAttention(torch.nn.Module):
    """Ours, in the form that DeepSpeed calls."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return Attention(CONFIG, Parts()).attend(torch.cat((query, key, values), dim=-1), None)


def run_deepspeeds(group: dist.ProcessGroup, part: torch.Tensor, direction: torch.Tensor) -> Tensors:
    fused = part.clone().requires_grad_()
    attention = DistributedAttention(LocalAttention(), group, scatter_idx=2, gather_idx=1)
    context = attention(*fused.chunk(3, dim=-1), 0)
    (context * direction).sum().backward()
    return {"output": context.detach(), "gradient": fused.grad}  # type: ignore[dict-item]


def attention_values() -> tuple[torch.Tensor, torch.Tensor]:
    return value("fused", BATCH, SEQ, HEADS, 3 * DIM), value("direction", BATCH, SEQ, HEADS, DIM)


MODELS = {
    "parallel residual": small(),
    "in turn, tied": small(use_parallel_residual=False, tie_word_embeddings=True),
}


def run_model(name: str, layers: Layers, tensor: Piece, context: int = 0, size: int = 1) -> Tensors:
    """Logits of this rank's part of the sequences and columns, and the gradients that this part gives."""
    model = GPTNeoXForCausalLM(MODELS[name], Parts(layers))
    with torch.no_grad():
        for spec in parameter_specs(MODELS[name]):
            whole = 0.1 * value(spec.name, *spec.shape)
            model.get_parameter(spec.name).copy_(tensor.of(whole, spec.shard_dim))
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    logits = model(ids.chunk(size, 1)[context])
    direction = tensor.of(value("logits", 2, 16, 64), "columns").chunk(size, 1)[context]
    (logits * direction).sum().backward()
    return {"output": logits.detach(), **{key: parameter.grad for key, parameter in model.named_parameters()}}  # type: ignore[dict-item]


LAYOUTS = {
    2: [ParallelDims(1, 1, 2, 1)],
    4: [ParallelDims(1, 1, 4, 1), ParallelDims(1, 1, 2, 2, sequence_parallel=True), ParallelDims(1, 2, 2, 1)],
}


def run_everything(size: int) -> tuple[Tensors, Tensors, Tensors, dict[tuple[int, str], Tensors]]:
    groups = Groups.create(LAYOUTS[size][0])
    rank, layers = dist.get_rank(), ShardedLayers(groups, torch.float32)
    part, direction = (whole.chunk(size, 1)[rank] for whole in attention_values())
    attention = run_attention(layers, part, direction)
    theirs = run_deepspeeds(groups.context, part, direction)
    models = {}
    for index, dims in enumerate(LAYOUTS[size]):
        groups = Groups.create(dims)
        tensor = Piece(groups.position("tensor"), dims.tensor, dims.sequence_parallel)
        for name in MODELS:
            layers = ShardedLayers(groups, torch.float32)
            models[index, name] = run_model(name, layers, tensor, groups.position("context"), dims.context)
    return run_exchange(dist.group.WORLD), attention, theirs, models


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[tuple[Tensors, Tensors, Tensors, dict[tuple[int, str], Tensors]]]]:
    return {size: run_ranks(run_everything, size, size) for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
def test_the_exchange_moves_and_changes_nothing(ranks: dict, size: int) -> None:
    whole = value("states", BATCH, SEQ, HEADS, DIM)
    for rank, (found, *_) in enumerate(ranks[size]):
        assert torch.equal(found["heads"], whole.chunk(size, 2)[rank])
        assert torch.equal(found["back"], whole.chunk(size, 1)[rank])
        assert torch.equal(found["there and back"], whole.chunk(size, 1)[rank])
        at_heads, at_sequence = value("at the heads", *whole.shape), value("at the sequence", *whole.shape)
        assert torch.equal(found["heads gradient"], at_heads.chunk(size, 1)[rank])
        assert torch.equal(found["back gradient"], at_sequence.chunk(size, 2)[rank])


@pytest.mark.parametrize("size", SIZES)
def test_attention_as_deepspeeds_ulysses_and_as_whole(ranks: dict, size: int) -> None:
    whole = run_attention(WholeLayers(), *attention_values())
    for rank, (_, ours, theirs, _) in enumerate(ranks[size]):
        for key in ("output", "gradient"):
            assert torch.equal(ours[key], theirs[key]), key
            torch.testing.assert_close(ours[key], whole[key].chunk(size, 1)[rank], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("size", "index"), [(size, index) for size in SIZES for index in range(len(LAYOUTS[size]))])
def test_a_model_of_split_sequences_is_the_model(ranks: dict, size: int, index: int, name: str) -> None:
    """Gradients add up over the context ranks, as the engine adds them up over replicas."""
    dims, expected = LAYOUTS[size][index], run_model(name, WholeLayers(), Piece())
    dim = {spec.name: spec.shard_dim for spec in parameter_specs(MODELS[name])}
    for group in dims.groups("context"):
        tensor = Piece(dims.coordinate(group[0], "tensor"), dims.tensor, dims.sequence_parallel)
        answers = [ranks[size][rank][3][index, name] for rank in group]
        found = {key: sum(answer[key] for answer in answers) for key in answers[0]}
        found["output"] = torch.cat([answer["output"] for answer in answers], dim=1)
        assert found.keys() == expected.keys()
        for key, whole in expected.items():
            part = tensor.of(whole, "columns" if key == "output" else dim[key])
            assert (found[key] - part).abs().max() < 2e-6 * whole.abs().max(), key


LONG = small(hidden_size=64, num_attention_heads=4, intermediate_size=64, num_hidden_layers=1, rotary_pct=0.5)
LENGTHS = {32_768: False, 8_192: True}
"""Lengths of a context, and whether to run the backward pass too."""


def run_long(layers: Layers, rank: int, size: int) -> dict[int, Tensors]:
    """Final hidden states of this rank's part of the sequences, and the gradients that they give."""
    body = GPTNeoX(LONG, Parts(layers))
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            parameter.copy_(0.3 * value(name, *parameter.shape))
    found: dict[int, Tensors] = {}
    for length, backward in LENGTHS.items():
        ids = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(2))
        with torch.set_grad_enabled(backward):
            hidden_states = body(ids.chunk(size, 1)[rank])
        found[length] = {"output": hidden_states.detach()}
        if backward:
            (hidden_states * value("long", 1, length, 64).chunk(size, 1)[rank]).sum().backward()
            found[length] |= {name: parameter.grad for name, parameter in body.named_parameters()}  # type: ignore[misc]
    return found


def run_long_part() -> dict[int, Tensors]:
    groups = Groups.create(ParallelDims(1, 1, 4, 1))
    return run_long(ShardedLayers(groups, torch.float32), dist.get_rank(), 4)


def test_long_contexts_are_those_of_one_rank() -> None:
    answers, whole = run_ranks(run_long_part, 4), run_long(WholeLayers(), 0, 1)
    for length, expected in whole.items():
        found = {key: sum(answer[length][key] for answer in answers) for key in expected}
        found["output"] = torch.cat([answer[length]["output"] for answer in answers], dim=1)
        assert found["output"].shape == (1, length, 64)
        for key, tensor in expected.items():
            assert (found[key] - tensor).abs().max() < 1e-5 * tensor.abs().max(), (length, key)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_own_parts_are_the_whole_in_order(size: int) -> None:
    whole = np.arange(24).reshape(2, 12)
    parts = [own_part(whole, size, index) for index in range(size)]
    assert {part.shape for part in parts} == {(2, 12 // size)}
    assert np.array_equal(np.concatenate(parts, axis=1), whole)
