"""The loss over a split vocabulary against torch's over a whole one, and against megatron-core's."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from megakor.parallel.dims import ParallelDims
from megakor.parallel.groups import Groups
from megakor.parallel.loss import VocabularyShard, vocabulary_loss
from tests.parallel.shards import Piece, value
from tests.ranks import run_ranks

ROWS = 24
BATCH, SEQ = 3, 10
SCALE = 0.37


@dataclass(frozen=True)
class Case:
    """Logits and labels of a loss.

    Attributes:
        num_tokens: the true vocabulary, of `ROWS` columns.
        chunk: logits worked through at a time.
        factor: size of the logits.
        masked: whether a part of the tokens, and a whole sequence, does not count.
        dtype: of the logits.
    """

    num_tokens: int
    chunk: int = 2**18
    factor: float = 1.0
    masked: bool = True
    dtype: torch.dtype = torch.float32

    def logits(self) -> torch.Tensor:
        """[batch, seq, rows]; the padding's are the largest, which must not matter."""
        logits = self.factor * value("logits", BATCH, SEQ, ROWS)
        logits[..., self.num_tokens :] = 3.0 * self.factor
        return logits.to(self.dtype)

    def labels(self) -> torch.Tensor:
        """[batch, seq]; the first ids are those at the borders of four ranks' columns."""
        borders = [0, self.num_tokens - 1, 5, 6, 11, 12, 17, 18]
        labels = torch.arange(BATCH * SEQ) * 7 % self.num_tokens
        labels[: len(borders)] = torch.tensor([min(label, self.num_tokens - 1) for label in borders])
        return labels.view(BATCH, SEQ)

    def mask(self) -> torch.Tensor:
        mask = torch.ones(BATCH, SEQ)
        if self.masked:
            mask[0, 3:5], mask[2] = 0.0, 0.0
        return mask


CASES = {
    "whole vocabulary": Case(24, masked=False),
    "masked": Case(24),
    "a row at a time": Case(24, chunk=1),
    "chunks that do not fit": Case(24, chunk=7 * 12),
    "one column of padding": Case(23),
    "three ranks of padding": Case(6),
    "a rank of padding": Case(13),
    "a rank of padding, chunks": Case(13, chunk=20),
    "one token": Case(1),
    "large logits": Case(20, factor=1e4),
    "small logits": Case(20, factor=1e-4),
    "bf16": Case(20, dtype=torch.bfloat16),
    "large bf16": Case(20, factor=1e4, dtype=torch.bfloat16),
}


def expected(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient by torch, from whole logits in fp32."""
    logits = case.logits().float().requires_grad_()
    real = logits[..., : case.num_tokens]
    losses = functional.cross_entropy(real.flatten(0, 1), case.labels().flatten(), reduction="none")
    loss = (losses * case.mask().flatten()).sum() * SCALE
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def run_case(case: Case, shard: VocabularyShard, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of a rank's columns."""
    logits = piece.of(case.logits(), "columns").clone().requires_grad_()
    loss = vocabulary_loss(logits, case.labels(), case.mask(), torch.tensor(SCALE), shard)
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def run_cases(size: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    groups, piece = Groups.create(ParallelDims(1, 1, 1, size)), Piece(dist.get_rank(), size)
    return {
        name: run_case(case, VocabularyShard.of(groups, ROWS, case.num_tokens, case.chunk), piece)
        for name, case in CASES.items()
    }


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict[str, tuple[torch.Tensor, torch.Tensor]]]]:
    return {size: run_ranks(run_cases, size, size) for size in (2, 4)}


def assert_right(name: str, answers: list[dict[str, tuple[torch.Tensor, torch.Tensor]]]) -> None:
    case, (loss, gradient) = CASES[name], expected(CASES[name])
    for rank, answer in enumerate(answers):
        found, part = answer[name]
        assert found.dtype == torch.float32
        assert part.dtype == case.dtype
        assert found == answers[0][name][0]  # the same bits on every rank
        assert found.item() == pytest.approx(loss.item(), rel=2e-6, abs=1e-12)
        own = Piece(rank, len(answers)).of(gradient, "columns")
        rounding = 2**-8 if case.dtype is torch.bfloat16 else 2e-6  # to 8 significant bits, once
        torch.testing.assert_close(part.float(), own, rtol=rounding, atol=1e-6)
        first = rank * ROWS // len(answers)
        assert not part[..., max(0, case.num_tokens - first) :].any()  # padding gets no gradient
        assert not part[case.mask() == 0].any()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_as_torch_has_it(ranks: dict, name: str, size: int) -> None:
    assert_right(name, ranks[size])


@pytest.mark.parametrize("name", CASES)
def test_one_rank_has_all_columns(name: str) -> None:
    case = CASES[name]
    shard = VocabularyShard(0, case.num_tokens, None, case.chunk)
    assert_right(name, [{name: run_case(case, shard, Piece())}])


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 12), chunk=st.integers(1, 120), data=st.data())
def test_any_chunk_gives_the_same_bits(rows: int, columns: int, chunk: int, data: st.DataObject) -> None:
    real = data.draw(st.integers(1, columns))
    labels = torch.tensor([[data.draw(st.integers(0, real - 1)) for _ in range(rows)]])
    answers = []
    for size in (chunk, 10**6):
        logits = value(f"{rows} × {columns}", 1, rows, columns).requires_grad_()
        shard = VocabularyShard(0, real, None, size)
        loss = vocabulary_loss(logits, labels, torch.ones(1, rows), torch.tensor(1.0), shard)
        loss.backward()
        answers.append((loss.detach(), logits.grad))
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=0)


def test_a_certain_wrong_guess_costs_what_it_says() -> None:
    """The label 2·10⁴ nats behind: no overflow, no NaN, and a gradient of ±1."""
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    shard = VocabularyShard(0, 3, None, 10)
    loss = vocabulary_loss(logits, torch.tensor([[1]]), torch.ones(1, 1), torch.tensor(1.0), shard)
    loss.backward()
    assert loss.item() == 2e4
    assert logits.grad is not None
    assert logits.grad.flatten().tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("logit", [-torch.inf, torch.inf, torch.nan])
@pytest.mark.parametrize("label", [0, 1])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(logit: float, label: int) -> None:
    """Also where its derivatives are: the label's logit -inf, as by an overflow. Another's at -inf is a finite loss."""
    logits = torch.tensor([[[1.0, 2.0, 3.0], [logit, 0.0, 1.0]]], requires_grad=True)
    shard = VocabularyShard(0, 3, None, 10)
    loss = vocabulary_loss(logits, torch.tensor([[2, label]]), torch.ones(1, 2), torch.tensor(1.0), shard)
    loss.backward()
    assert logits.grad is not None
    if logit == -torch.inf and label != 0:
        assert loss.isfinite()
        assert logits.grad.isfinite().all()
    else:
        assert not loss.isfinite()
        assert not logits.grad.isfinite().any()


class Sizes(TorchDispatchMode):
    """The number of elements and the type of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.made.add((tensor.numel(), tensor.dtype))
        return result


def tensors_made(num_rows: int, columns: int, chunk: int) -> set[tuple[int, torch.dtype]]:
    """What forward and backward make on a rank that has half of the vocabulary."""
    groups = Groups.create(ParallelDims(1, 1, 1, 2))
    shard = VocabularyShard.of(groups, 2 * columns, 2 * columns - 1, chunk)
    logits = value("logits", 1, num_rows, columns).bfloat16().requires_grad_()
    labels = torch.arange(num_rows).view(1, -1)
    with Sizes() as sizes:
        vocabulary_loss(logits, labels, torch.ones(1, num_rows), torch.tensor(1.0), shard).backward()
    return sizes.made


def test_no_rank_makes_a_whole_vocabulary() -> None:
    """In the logits' type only as many as its own logits; in fp32 only a chunk of them."""
    num_rows, columns, chunk = 64, 100, 800
    for made in run_ranks(tensors_made, 2, num_rows, columns, chunk):
        assert max(size for size, _ in made) == num_rows * columns
        assert {dtype for size, dtype in made if size > chunk} == {torch.bfloat16}
        assert (chunk, torch.float32) in made or (chunk - 8, torch.float32) in made


def megatron_losses() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """megatron-core's loss of the cases without padding, which it does not know."""
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    found = {}
    for name, case in CASES.items():
        if case.num_tokens == ROWS:
            logits = Piece(dist.get_rank(), 2).of(case.logits(), "columns").clone().requires_grad_()
            losses = vocab_parallel_cross_entropy(logits.clone(), case.labels())
            loss = (losses * case.mask()).sum() * SCALE
            loss.backward()
            found[name] = (loss.detach(), logits.grad)
    return found  # type: ignore[return-value]


def test_as_megatron_has_it(ranks: dict) -> None:
    for ours, theirs in zip(ranks[2], run_ranks(megatron_losses, 2), strict=True):
        assert len(theirs) == 4
        for name, (loss, gradient) in theirs.items():
            assert ours[name][0].item() == pytest.approx(loss.item(), rel=1e-6)
            torch.testing.assert_close(ours[name][1], gradient, rtol=2e-6, atol=1e-7)


def test_shares_of_the_columns() -> None:
    """First column and real columns of each rank."""

    def shares(size: int, num_rows: int, num_tokens: int) -> list[tuple[int, int]]:
        dims = ParallelDims(1, 1, 1, size)
        ranks = [Groups(dims, rank, None, None, None) for rank in range(size)]  # type: ignore[arg-type]
        shards = [VocabularyShard.of(groups, num_rows, num_tokens, 1) for groups in ranks]
        return [(shard.first, shard.num_real) for shard in shards]

    assert shares(1, 24, 20) == [(0, 20)]
    assert shares(4, 24, 13) == [(0, 6), (6, 6), (12, 1), (18, 0)]
    assert shares(4, 24, 24) == [(0, 6), (6, 6), (12, 6), (18, 6)]
    assert shares(4, 30_080, 30_003) == [(0, 7520), (7520, 7520), (15_040, 7520), (22_560, 7443)]
    assert sum(real for _, real in shares(8, 30_080, 30_003)) == 30_003
