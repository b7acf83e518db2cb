"""A tensor rank's layers against whole ones, and against megatron-core's: outputs and gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megakor.model.gpt_neox import GPTNeoXForCausalLM, Parts
from megakor.model.layers import Layers, WholeLayers
from megakor.model.specs import parameter_specs
from megakor.parallel.dims import ParallelDims
from megakor.parallel.groups import Groups
from megakor.parallel.layers import ShardedLayers
from megakor.parallel.tensor import TensorRegion
from tests.model.configs import small
from tests.parallel.shards import Piece, Tensors, value
from tests.ranks import run_ranks

HIDDEN, INNER, ROWS, BATCH, SEQ = 12, 16, 20, 3, 8


@dataclass(frozen=True)
class Program:
    """A use of the layers.

    Attributes:
        make: the layers by name.
        run: their use.
        enters: where the input is: `ids`, `residual` or `columns`.
        leaves: where the output is.
        dims: dimension along which parameters are cut.
    """

    make: Callable[[Layers], dict[str, nn.Module]]
    run: Callable[[Layers, Any, torch.Tensor], torch.Tensor]
    enters: str
    leaves: str
    dims: dict[str, int]


def join_two(layers: Layers, made: Any, states: torch.Tensor) -> torch.Tensor:
    return layers.join(made["a"](states) + made["b"](2 * states), made["a"], made["b"])


def adapted(layers: Layers, layer: nn.Linear) -> dict[str, nn.Module]:
    """A frozen layer with an adapter."""
    layer.requires_grad_(False)
    layer.lora_A, layer.lora_B = layers.adapters(layer, 2)
    layer.lora_scale = 0.125  # type: ignore[assignment]
    return {"a": layer}


PROGRAMS = {
    "column": Program(
        lambda layers: {"a": layers.column(HIDDEN, INNER, bias=True)},
        lambda layers, made, states: made["a"](states),
        "residual", "columns", {"a.weight": 0, "a.bias": 0},
    ),
    "row": Program(
        lambda layers: {"a": layers.row(INNER, HIDDEN, bias=False)},
        lambda layers, made, states: layers.join(made["a"](states), made["a"]),
        "columns", "residual", {"a.weight": 1},
    ),
    "two rows, one join": Program(
        lambda layers: {name: layers.row(INNER, HIDDEN, bias=True) for name in "ab"},
        join_two, "columns", "residual", {"a.weight": 1, "b.weight": 1},
    ),
    "embedding": Program(
        lambda layers: {"a": layers.embedding(ROWS, HIDDEN)},
        lambda layers, made, ids: made["a"](ids),
        "ids", "residual", {"a.weight": 0},
    ),
    "tied head": Program(
        lambda layers: {"a": layers.embedding(ROWS, HIDDEN)},
        lambda layers, made, states: made["a"].project(states),
        "residual", "columns", {"a.weight": 0},
    ),
    "norm": Program(
        lambda layers: {"a": layers.norm(HIDDEN, 1e-5)},
        lambda layers, made, states: made["a"](states),
        "residual", "residual", {},
    ),
    "column with an adapter": Program(
        lambda layers: adapted(layers, layers.column(HIDDEN, INNER, bias=True)),
        lambda layers, made, states: made["a"](states),
        "residual", "columns", {"a.weight": 0, "a.bias": 0, "a.lora_B.weight": 0},
    ),
    "row with an adapter": Program(
        lambda layers: adapted(layers, layers.row(INNER, HIDDEN, bias=True)),
        lambda layers, made, states: layers.join(made["a"](states), made["a"]),
        "columns", "residual", {"a.weight": 1, "a.lora_A.weight": 1},
    ),
    "column, row, norm": Program(
        lambda layers: {
            "up": layers.column(HIDDEN, INNER, bias=True), "down": layers.row(INNER, HIDDEN, bias=True),
            "norm": layers.norm(HIDDEN, 1e-5),
        },
        lambda layers, made, states: made["norm"](
            states + layers.join(made["down"](torch.tanh(made["up"](states))), made["down"])
        ),
        "residual", "residual", {"up.weight": 0, "up.bias": 0, "down.weight": 1},
    ),
}  # fmt: skip


def fill(module: nn.Module, piece: Piece, dims: dict[str, int], name: str) -> None:
    """Give the parameters this rank's part of values that depend on their names."""
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            dim = dims.get(key)
            shape = [size * (piece.size if d == dim else 1) for d, size in enumerate(parameter.shape)]
            parameter.copy_(piece.of(value(f"{name}.{key}", *shape), dim))


def run_program(name: str, layers: Layers, piece: Piece) -> Tensors:
    """Output and gradients of a program on this rank."""
    program = PROGRAMS[name]
    made = nn.ModuleDict(program.make(layers))
    fill(made, piece, program.dims, name)
    if program.enters == "ids":
        states = torch.randint(0, ROWS, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    else:
        whole = value(name, BATCH, SEQ, HIDDEN if program.enters == "residual" else INNER)
        states = piece.of(whole, program.enters).clone().requires_grad_()
    output = program.run(layers, made, states)
    features = ROWS if name == "tied head" else HIDDEN if program.leaves == "residual" else INNER
    direction = piece.of(value(f"{name}, direction", BATCH, SEQ, features), program.leaves)
    (output * direction).sum().backward()
    gradients = {key: parameter.grad for key, parameter in made.named_parameters() if parameter.requires_grad}
    if states.is_floating_point():
        gradients["input"] = states.grad
    return {"output": output.detach(), **gradients}  # type: ignore[dict-item]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_column_keeps_no_input(alone: None, frozen: bool) -> None:
    states, weight = torch.ones(1, 2, 3, requires_grad=True), torch.ones(4, 3, requires_grad=not frozen)
    output = TensorRegion(dist.group.WORLD, sequence_parallel=True).column(states, weight)
    kept_states, kept_weight = output.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert kept_weight is weight
    assert (kept_states is None) is frozen


MODELS = {
    "parallel residual": small(),
    "in turn, tied": small(use_parallel_residual=False, tie_word_embeddings=True),
    "no attention biases": small(attention_bias=False, rotary_pct=1.0),
}
"""Four heads."""


def run_model(name: str, layers: Layers, piece: Piece) -> Tensors:
    """Logits and gradients of a whole model."""
    config = MODELS[name]
    model = GPTNeoXForCausalLM(config, Parts(layers))
    with torch.no_grad():
        for spec in parameter_specs(config):
            whole = 0.1 * value(spec.name, *spec.shape)
            model.get_parameter(spec.name).copy_(piece.of(whole, spec.shard_dim))
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    logits = model(ids)
    (logits * piece.of(value("logits", 2, 16, 64), "columns")).sum().backward()
    return {"output": logits.detach(), **{key: parameter.grad for key, parameter in model.named_parameters()}}  # type: ignore[dict-item]


Answers = dict[tuple[bool, str], Tensors]


def run_everything(size: int) -> Answers:
    found = {}
    for sequence_parallel in (False, True):
        groups = Groups.create(ParallelDims(1, 1, 1, size, sequence_parallel))
        layers, piece = ShardedLayers(groups, torch.float32), Piece(dist.get_rank(), size, sequence_parallel)
        found |= {(sequence_parallel, name): run_program(name, layers, piece) for name in PROGRAMS}
        found |= {(sequence_parallel, name): run_model(name, layers, piece) for name in MODELS}
    return found


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[Answers]]:
    """The answers of two and of four tensor ranks."""
    return {size: run_ranks(run_everything, size, size) for size in (2, 4)}


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", PROGRAMS)
def test_layers_are_parts_of_the_whole(ranks: dict, name: str, size: int, sequence_parallel: bool) -> None:
    program, expected = PROGRAMS[name], run_program(name, WholeLayers(), Piece())
    places = {"output": program.leaves, "input": program.enters, **program.dims}
    for rank, answers in enumerate(ranks[size]):
        piece, found = Piece(rank, size, sequence_parallel), answers[sequence_parallel, name]
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            part = piece.of(expected[key], places.get(key))
            torch.testing.assert_close(tensor, part, rtol=2e-6, atol=4e-6, msg=lambda text, key=key: f"{key}: {text}")
            if key not in places:  # every rank holds it whole: no two may drift apart
                assert torch.equal(tensor, ranks[size][0][sequence_parallel, name][key]), key


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_shards_is_the_model(ranks: dict, name: str, size: int, sequence_parallel: bool) -> None:
    expected = run_model(name, WholeLayers(), Piece())
    places = {"output": "columns", **{spec.name: spec.shard_dim for spec in parameter_specs(MODELS[name])}}
    for rank, answers in enumerate(ranks[size]):
        piece, found = Piece(rank, size, sequence_parallel), answers[sequence_parallel, name]
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            far = (tensor - piece.of(expected[key], places[key])).abs().max() / expected[key].abs().max()
            assert far < 2e-6, key
            if places[key] is None:
                assert torch.equal(tensor, ranks[size][0][sequence_parallel, name][key]), key


def megatron(name: str, config: Any, piece: Piece) -> Tensors:
    """The same program with megatron-core's layers, whose hidden states are [seq, batch, features]."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

    program, options = PROGRAMS[name], {"config": config, "init_method": nn.init.zeros_}
    if name == "column":
        layer: Any = ColumnParallelLinear(HIDDEN, INNER, gather_output=False, **options)
    elif name == "row":
        layer = RowParallelLinear(INNER, HIDDEN, bias=False, input_is_parallel=True, skip_bias_add=False, **options)
    else:
        layer = VocabParallelEmbedding(ROWS, HIDDEN, reduce_scatter_embeddings=piece.sequence_parallel, **options)
    made = nn.ModuleDict({"a": layer})
    fill(made, piece, program.dims, name)
    states = torch.randint(0, ROWS, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    turned = name != "embedding" or piece.sequence_parallel
    if name == "embedding":
        output = layer(states)
    else:
        whole = value(name, BATCH, SEQ, HIDDEN if name == "column" else INNER)
        states = piece.of(whole, program.enters).clone().requires_grad_()
        output, _ = layer(states.transpose(0, 1).contiguous())
    output = output.transpose(0, 1) if turned else output
    features = INNER if name == "column" else HIDDEN
    (output * piece.of(value(f"{name}, direction", BATCH, SEQ, features), program.leaves)).sum().backward()
    gradients = {key: parameter.grad for key, parameter in made.named_parameters()}
    if states.is_floating_point():
        gradients["input"] = states.grad
    return {"output": output.detach().contiguous(), **gradients}


MEGATRON = ("column", "row", "embedding")


def megatron_programs() -> Answers:
    """megatron-core on CPUs: it asks CUDA where to put its buffers, and is told here."""
    warnings.simplefilter("ignore")
    from megatron.core import ModelParallelConfig, parallel_state

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    found: Answers = {}
    for sequence_parallel in (False, True):
        config = ModelParallelConfig(
            tensor_model_parallel_size=2, sequence_parallel=sequence_parallel, use_cpu_initialization=True
        )
        piece = Piece(dist.get_rank(), 2, sequence_parallel)
        found |= {(sequence_parallel, name): megatron(name, config, piece) for name in MEGATRON}
    return found


@pytest.fixture(scope="module")
def of_megatron() -> list[Answers]:
    return run_ranks(megatron_programs, 2)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", MEGATRON)
def test_layers_as_megatron_has_them(of_megatron: list, ranks: dict, name: str, sequence_parallel: bool) -> None:
    for ours, theirs in zip(ranks[2], of_megatron, strict=True):
        found, expected = ours[sequence_parallel, name], theirs[sequence_parallel, name]
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, expected[key], rtol=2e-6, atol=4e-6)
