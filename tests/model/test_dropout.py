"""Dropout from a counter: which masks are alike, how many zeros they have, and what is left as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megakor.config.schema import ActivationCheckpointing
from megakor.model.dropout import DropoutCounter
from megakor.model.gpt_neox import Attention, GPTNeoXForCausalLM, Parts
from megakor.model.parameters import initial_value, initialize_parameters
from megakor.model.specs import parameter_specs
from megakor.parallel.build import parts_of
from megakor.parallel.dims import ParallelDims
from megakor.parallel.groups import Groups
from megakor.train.device import device
from megakor.train.engine import StepResult
from tests.distributed.runs import PP2, zero
from tests.model.configs import small
from tests.ranks import run_ranks
from tests.train.engines import LR, Heldout, config_of, make_engine, micro_batches, train

CONFIG = small(hidden_dropout=0.25, attention_dropout=0.25)
IDS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))


def random_states() -> list[object]:
    """The random states of everything that a mask could be drawn from."""
    name, keys, position, *rest = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), position, *rest]


def model_of(counter: DropoutCounter, **changes: float) -> GPTNeoXForCausalLM:
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    model = GPTNeoXForCausalLM(config, Parts(counter=counter))
    initialize_parameters(model.named_parameters(), config, seed=3)
    return model.train()


def logits(model: GPTNeoXForCausalLM, counter: DropoutCounter, step: int, micro_batch: int = 0) -> torch.Tensor:
    counter.start_step(step)
    counter.micro_batch += micro_batch
    with torch.no_grad():
        return model(IDS)


COUNT = st.integers(0, 10**7)
WHERE = st.tuples(COUNT, COUNT, COUNT, COUNT, st.text("0123.amlp", max_size=9))


@settings(deadline=None)
@given(WHERE, WHERE)
def test_keys_are_alike_only_in_one_place(first: tuple, second: tuple) -> None:
    def key(seed: int, step: int, micro_batch: int, part: int, place: str) -> int:
        found = DropoutCounter(seed, step=step, micro_batch=micro_batch).key(place, part)
        assert 0 <= found < 2**63
        return found

    assert (key(*first) == key(*second)) is (first == second)


def test_masks_are_those_of_their_keys() -> None:
    counter, ones = DropoutCounter(), torch.ones(50, 50)
    masks = [counter.dropout(ones, 0.5, key) for key in (7, 8, 7)]
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])
    assert counter.dropout(ones, 0.5, None) is ones


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_the_rate_of_the_residual(probability: float) -> None:
    count = 400_000
    dropped = DropoutCounter().dropout(torch.ones(count), probability, 1)
    kept = dropped != 0
    spread = (probability * (1 - probability) / count) ** 0.5
    assert abs(kept.float().mean().item() - (1 - probability)) < 5 * spread
    torch.testing.assert_close(dropped[kept], torch.full((int(kept.sum()),), 1 / (1 - probability)))
    pairs = (kept[1:] & kept[:-1]).float().mean().item()  # neighbours are independent
    assert abs(pairs - (1 - probability) ** 2) < 0.005


def test_the_rate_of_attention_weights() -> None:
    """Keys of zero give each position equal weights, values of one their sum: 1 ± sqrt(p / (1 - p) / position)."""
    probability, heads, length = 0.2, 4, 256
    config = small(hidden_size=32, num_attention_heads=heads, attention_dropout=probability)
    fused = torch.cat((torch.zeros(8, length, heads, 16), torch.ones(8, length, heads, 8)), dim=-1)
    sums = Attention(config, Parts()).attend(fused, key=5)[..., 0].transpose(1, 2)  # [batch, heads, seq]
    first = sums[..., 0]
    assert {round(weight, 5) for weight in first.flatten().tolist()} == {0.0, 1.25}  # a single weight
    positions = torch.arange(1, length + 1)
    standard = (sums - 1) / (probability / (1 - probability) / positions).sqrt()
    assert abs(standard.mean().item()) < 5 / (8 * heads * length) ** 0.5
    assert standard.var().item() == pytest.approx(1.0, abs=0.06)
    assert torch.unique(sums[0, :, -1]).numel() > 1  # heads differ


@pytest.mark.parametrize("kind", ["hidden_dropout", "attention_dropout"])
def test_a_pass_depends_on_where_training_stands(kind: str) -> None:
    other = {"hidden_dropout", "attention_dropout"} - {kind}
    counter = DropoutCounter(seed=1)
    model = model_of(counter, **dict.fromkeys(other, 0.0))
    first = logits(model, counter, step=4, micro_batch=2)
    assert torch.equal(first, logits(model, counter, step=4, micro_batch=2))
    assert torch.equal(first, logits(model_of(counter, **dict.fromkeys(other, 0.0)), counter, step=4, micro_batch=2))
    changes: dict[str, Callable[[], torch.Tensor]] = {
        "step": lambda: logits(model, counter, step=5, micro_batch=2),
        "micro-batch": lambda: logits(model, counter, step=4, micro_batch=1),
    }
    for attribute in ("seed", "heads" if kind == "attention_dropout" else "residual"):
        moved = replace(counter, **{attribute: 9})
        changed = model_of(moved, **dict.fromkeys(other, 0.0))
        changes[attribute] = lambda changed=changed, moved=moved: logits(changed, moved, step=4, micro_batch=2)  # type: ignore[misc]
    for name, change in changes.items():
        assert (change() - first).abs().max() > 1e-3, name


def test_successive_passes_are_micro_batches() -> None:
    counter = DropoutCounter()
    model = model_of(counter)
    with torch.no_grad():
        counter.start_step(3)
        passes = [model(IDS) for _ in range(3)]
    for index, found in enumerate(passes):
        assert torch.equal(found, logits(model, counter, step=3, micro_batch=index))
    assert not torch.equal(passes[0], passes[1])


class Recorded(DropoutCounter):
    """Keeps the keys that masks were drawn from."""

    def __init__(self) -> None:
        super().__init__(residual=5, heads=6)
        self.places: dict[str, int] = {}

    def key(self, place: str, part: int) -> int:
        self.places[place] = part
        return super().key(place, part)


@pytest.mark.parametrize("in_turn", [False, True])
def test_every_layer_and_branch_has_its_own_mask(in_turn: bool) -> None:
    counter = Recorded()
    config = replace(CONFIG, use_parallel_residual=not in_turn)
    model = GPTNeoXForCausalLM(config, Parts(counter=counter)).train()
    model(IDS)
    layers = range(config.num_hidden_layers)
    assert {place for place, part in counter.places.items() if part == 6} == {f"{i}.attention" for i in layers}
    residual = {place for place, part in counter.places.items() if part == 5}
    assert residual == {f"{i}.{name}" for i in layers for name in ("attention.dense", "mlp")}


def test_evaluation_and_rates_of_zero_drop_nothing() -> None:
    counter = Recorded()
    model = model_of(counter)
    plain = model_of(counter, hidden_dropout=0.0, attention_dropout=0.0)
    expected = logits(plain, counter, step=1)
    assert not counter.places
    for step in (0, 1):
        assert torch.equal(logits(model.eval(), counter, step), expected)
    assert not counter.places
    assert not torch.equal(logits(model.train(), counter, step=1), expected)


@pytest.mark.parametrize("checkpointing", ActivationCheckpointing)
def test_random_states_are_left_alone(checkpointing: ActivationCheckpointing) -> None:
    model = GPTNeoXForCausalLM(CONFIG, Parts(checkpointing=checkpointing)).train()
    initialize_parameters(model.named_parameters(), CONFIG, seed=3)
    before = random_states()
    first = model(IDS)
    first.sum().backward()
    assert random_states() == before
    torch.manual_seed(99)
    model.parts.counter.start_step(0)
    assert torch.equal(model(IDS), first)  # nor does a mask depend on them


LAYOUTS = {
    "tp2": ParallelDims(1, 1, 1, 2),
    "tp2 sp": ParallelDims(1, 1, 1, 2, sequence_parallel=True),
    "dp2": ParallelDims(1, 2, 1, 1),
    "cp2": ParallelDims(1, 1, 2, 1),
}


def hidden_states(dims: ParallelDims, attention_dropout: float) -> torch.Tensor:
    """This rank's final hidden states, all ranks reading the same tokens at every position."""
    groups = Groups.create(dims)
    parts = parts_of(config_of(), groups, torch.float32, device())
    model = GPTNeoXForCausalLM(replace(CONFIG, attention_dropout=attention_dropout), parts).train()
    with torch.no_grad():
        for spec in parameter_specs(CONFIG):
            shard = spec.shard(groups.position("tensor"), dims.tensor)
            model.get_parameter(spec.name).copy_(shard.of(initial_value(spec, 0)))
        model.parts.counter.start_step(2)
        return model.gpt_neox(torch.full((2, 24 // dims.context), 7))


def all_hidden_states() -> dict[tuple[str, float], torch.Tensor]:
    answers = {(name, rate): hidden_states(dims, rate) for name, dims in LAYOUTS.items() for rate in (0.0, 0.25)}
    dist.barrier()
    return answers


def test_which_ranks_draw_the_same_masks() -> None:
    """Tensor ranks hold the same residual stream, so its mask must be one; all other parts have masks of their own."""
    first, second = run_ranks(all_hidden_states, 2)
    for rate in (0.0, 0.25):
        assert torch.equal(first["tp2", rate], second["tp2", rate])
        for name in ("tp2 sp", "dp2", "cp2"):
            assert first[name, rate].shape == second[name, rate].shape
            dropped = (first[name, rate] - second[name, rate]).abs()
            assert (dropped > 1e-3).float().mean() > 0.5, name


SHARDED = {"parallel__tensor_parallel_size": 2, "parallel__sequence_parallel": True}
CHECKPOINTING = {"train__activation_checkpointing": ActivationCheckpointing.full}
ENGINES: dict[bool, dict[str, dict[str, Any]]] = {
    False: {
        "dp2": {},
        "dp2 zero3": zero(3),
        "tp2 sp": SHARDED,
        "tp2 sp, checkpointing": SHARDED | CHECKPOINTING,
    },
    True: {"pp2": PP2, "pp2, checkpointing": PP2 | CHECKPOINTING},
}
"""Layouts by whether they are pipelined."""
DROPOUT = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}


@dataclass(frozen=True)
class Answer:
    """What an engine with dropout did.

    Attributes:
        nats: of a held-out set, before any training.
        plain_nats: by an engine without dropout.
        losses: of two steps, with an evaluation before each.
        again: the same without an evaluation.
        without_dropout: the same by an engine without dropout.
        touched: whether any random state changed.
    """

    nats: float
    plain_nats: float
    losses: list[StepResult]
    again: list[StepResult]
    without_dropout: list[StepResult]
    touched: bool


def run_engine(changes: dict[str, Any]) -> Answer:
    engine, before = make_engine(config_of(**DROPOUT, **changes)), random_states()
    nats = engine.evaluate(Heldout())
    losses = []
    for step in range(2):
        losses.append(engine.train_step(micro_batches(step, engine.data_rank, engine.dims.data), LR, step))
        engine.evaluate(Heldout())
    touched = random_states() != before
    torch.manual_seed(dist.get_rank() + 5)
    again = train(make_engine(config_of(**DROPOUT, **changes)), 2)
    plain = make_engine(config_of(**changes))
    return Answer(nats, plain.evaluate(Heldout()), losses, again, train(plain, 2), touched)


def run_engines(pipelined: bool) -> dict[str, Answer]:
    return {name: run_engine(changes) for name, changes in ENGINES[pipelined].items()}


@pytest.fixture(scope="module")
def engines() -> list[dict[str, Answer]]:
    """The answers of two ranks."""
    ranks = [run_ranks(run_engines, 2, pipelined) for pipelined in ENGINES]
    return [plain | pipelined for plain, pipelined in zip(*ranks, strict=True)]


@pytest.mark.parametrize("name", [name for layouts in ENGINES.values() for name in layouts])
def test_engines_drop_in_training_only_and_leave_random_states_alone(engines: list, name: str) -> None:
    first, second = (answers[name] for answers in engines)
    assert not first.touched
    assert not second.touched
    assert first.nats == first.plain_nats == second.nats
    assert first.losses == first.again == second.losses  # of both steps; evaluating moves no mask
    for found, plain in zip(first.losses, first.without_dropout, strict=True):
        assert found.loss == pytest.approx(plain.loss, rel=0.05)
        assert abs(found.loss - plain.loss) > 1e-5
        assert abs(found.grad_norm - plain.grad_norm) > 1e-5


@pytest.mark.parametrize("name", ["pp2", "tp2 sp"])
def test_checkpointing_draws_the_same_masks(engines: list, name: str) -> None:
    """In a pipeline, blocks are recomputed when later micro-batches have passed already."""
    answers = engines[0]
    for found, expected in zip(answers[f"{name}, checkpointing"].losses, answers[name].losses, strict=True):
        assert found.loss == pytest.approx(expected.loss, rel=1e-7)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-7)
