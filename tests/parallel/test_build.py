"""What each rank's model holds, who saves it, and what seeds its dropout, in every kind of layout."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megakor.config.schema import ModelConfig
from megakor.model.gpt_neox import Block
from megakor.model.specs import Shard, parameter_specs
from megakor.parallel.build import build
from megakor.parallel.dims import ParallelDims
from megakor.parallel.groups import Groups
from megakor.train.device import device
from tests.distributed.runs import Made, configuration
from tests.model.configs import small
from tests.ranks import run_ranks

NUM_TOKENS = 50
"""Of 64 rows."""


@dataclass(frozen=True)
class Layout:
    dims: ParallelDims
    model: ModelConfig
    partition: str = "parameters"


TIED = small(tie_word_embeddings=True)
LAYOUTS = {
    "dp4": Layout(ParallelDims(1, 4, 1, 1), small()),
    "tp4": Layout(ParallelDims(1, 1, 1, 4), small()),
    "tp4 sp": Layout(ParallelDims(1, 1, 1, 4, sequence_parallel=True), TIED),
    "tp2 dp2": Layout(ParallelDims(1, 2, 1, 2), small(attention_bias=False)),
    "cp2 tp2": Layout(ParallelDims(1, 1, 2, 2), small()),
    "cp2 tp2 sp": Layout(ParallelDims(1, 1, 2, 2, sequence_parallel=True), small()),
    "dp2 cp2": Layout(ParallelDims(1, 2, 2, 1), small()),
    "pp2 tp2": Layout(ParallelDims(2, 1, 1, 2), small()),
    "pp2 tp2 sp tied": Layout(ParallelDims(2, 1, 1, 2, sequence_parallel=True), TIED),
    "pp2 dp2 tied": Layout(ParallelDims(2, 2, 1, 1), TIED, "uniform"),
    "pp4": Layout(ParallelDims(4, 1, 1, 1), small(num_hidden_layers=4), "type:Block"),
    "pp4 tied": Layout(ParallelDims(4, 1, 1, 1), replace(TIED, num_hidden_layers=4)),
}


@dataclass(frozen=True)
class Answer:
    """A rank's model: its parameters' shapes and shards, and which it saves; its logits; its dropout."""

    shapes: dict[str, tuple[int, ...]]
    shards: dict[str, Shard]
    saved: set[str]
    split_for_deepspeed: set[str]
    blocks: list[int]
    first_column: int
    real_columns: int
    residual: int
    heads: int


def build_layout(layout: Layout) -> Answer:
    config = configuration(Made("", "", ""), Path("run"), parallel__pipeline_partition=layout.partition)
    groups = Groups.create(layout.dims)
    built = build(config, layout.model, NUM_TOKENS, groups, torch.float32, device(), loss_chunk=100)
    assert [name for name, _ in built.named] == list(built.held)
    return Answer(
        shapes={name: tuple(parameter.shape) for name, parameter in built.named},
        shards={name: held.shard for name, held in built.held.items()},
        saved={name for name, held in built.held.items() if not held.saved_elsewhere},
        split_for_deepspeed={name for name, parameter in built.named if parameter.model_parallel},  # type: ignore[attr-defined]
        blocks=[module.index for module in built.module.modules() if isinstance(module, Block)],
        first_column=built.vocabulary.first,
        real_columns=built.vocabulary.num_real,
        residual=built.counter.residual,
        heads=built.counter.heads,
    )


def build_all() -> dict[str, Answer]:
    return {name: build_layout(layout) for name, layout in LAYOUTS.items()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Answer]]:
    return run_ranks(build_all, 4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_hold_their_parts(ranks: list, name: str) -> None:
    dims, config = LAYOUTS[name].dims, LAYOUTS[name].model
    specs = {spec.name: spec for spec in parameter_specs(config)}
    blocks: Counter[int] = Counter()
    for rank, answer in ((rank, answers[name]) for rank, answers in enumerate(ranks)):
        tensor = dims.coordinate(rank, "tensor")
        for key, shape in answer.shapes.items():
            split = specs[key].shard_dim is not None and dims.tensor > 1
            expected = Shard(specs[key].shard_dim or 0, tensor, dims.tensor) if split else Shard()
            assert answer.shards[key] == expected, key
            assert shape == expected.shape(specs[key].shape), key
            assert (key in answer.split_for_deepspeed) is split, key
        columns = 64 // dims.tensor
        assert answer.first_column == tensor * columns
        assert answer.real_columns == min(columns, max(0, NUM_TOKENS - tensor * columns))
        blocks.update(answer.blocks)
        replica = ranks[dims.peers(rank, "data", "context")[0]][name]
        assert (answer.shapes, answer.saved) == (replica.shapes, replica.saved)
    assert blocks == dict.fromkeys(range(config.num_hidden_layers), 4 // dims.pipeline)


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_shard_is_saved_once(ranks: list, name: str) -> None:
    dims, config = LAYOUTS[name].dims, LAYOUTS[name].model
    first_replicas = [rank for rank in range(4) if dims.peers(rank, "data", "context")[0] == rank]
    saved = Counter((key, ranks[rank][name].shards[key]) for rank in first_replicas for key in ranks[rank][name].saved)
    assert set(saved.values()) == {1}
    for spec in parameter_specs(config):
        expected = {spec.shard(index, dims.tensor) for index in range(dims.tensor)}
        assert {shard for key, shard in saved if key == spec.name} == expected, spec.name


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_share_a_mask_where_they_share_what_it_masks(ranks: list, name: str) -> None:
    """Another part of the batch, of a sequence or of the heads has another mask; stages differ in their blocks."""
    dims = LAYOUTS[name].dims
    for rank in range(4):
        for other in range(4):
            first, second = ranks[rank][name], ranks[other][name]
            data, context, tensor = (
                dims.coordinate(rank, axis) == dims.coordinate(other, axis) for axis in ("data", "context", "tensor")
            )
            same_part = data and context and (tensor or not dims.sequence_parallel)
            assert (first.residual == second.residual) is same_part, (rank, other)
            assert (first.heads == second.heads) is (data and context and tensor), (rank, other)


def test_a_vocabulary_that_cannot_be_split_is_refused() -> None:
    groups: Any = Groups(ParallelDims(1, 1, 1, 2), 0, None, None, None)  # type: ignore[arg-type]
    config = configuration(Made("", "", ""), Path("run"))
    rule = "model.vocab_size=63 must be divisible by parallel.tensor_parallel_size=2"
    with pytest.raises(ValueError, match=rule):
        build(config, small(vocab_size=63), NUM_TOKENS, groups, torch.float32, device(), loss_chunk=100)
