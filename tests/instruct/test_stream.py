"""Pairs as batches: what is learnt, in which order, who gets which rows, and that sharing a row changes nothing."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from megakor.data.plan import Plan
from megakor.data.stream import Batch
from megakor.instruct.pairs import Pair
from megakor.instruct.stream import Example, HeldoutPairs, PairStream, tokenise
from megakor.instruct.template import render_answer, render_prompt
from megakor.model.documents import Borders
from megakor.model.gpt_neox import GPTNeoXForCausalLM
from megakor.model.loss import token_losses
from megakor.model.parameters import initialize_parameters
from tests.model.configs import small

EOD = 0


class Letters:
    """One id a character."""

    eod_id = EOD

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


PAIRS = [Pair(f"질문 {index}", "" if index % 2 else "맥락", "답" * (1 + index)) for index in range(10)]
EXAMPLES = tokenise(PAIRS, Letters(), 96)  # type: ignore[arg-type]


def stream(**changes) -> PairStream:
    settings = {"seed": 7, "sequence_length": 96, "global_batch_size": 4, "packing": False} | changes
    plan = Plan(settings.pop("global_batch_size"), settings.pop("sequence_length"))
    return PairStream(EXAMPLES, EOD, plan=plan, **settings)


def epoch(**changes) -> Batch:
    """All rows at once."""
    num_rows = len(stream(**changes).rows.rows)
    return stream(global_batch_size=num_rows, **changes).micro_batches(0, 0, 1, num_rows)[0]


def documents(batch: Batch) -> list[Example]:
    """The examples of a batch, each from its document alone; of padding, none."""
    assert batch.documents is not None
    found = []
    for ids, labels, mask, numbers in zip(batch.input_ids, batch.labels, batch.loss_mask, batch.documents, strict=True):
        assert (np.diff(numbers) >= 0).all()
        for number in np.unique(numbers):
            own = numbers == number
            learnt = mask[own]
            if learnt.any():
                assert (ids[own][1:] == labels[own][:-1]).all()
                answer = labels[own][learnt == 1].tolist()
                prompt_length = 1 + int(np.argmax(learnt))
                assert learnt[prompt_length - 1 :].all()
                text = "".join(map(chr, answer[:-1]))
                found.append(Example([*ids[own].tolist(), int(labels[own][-1])], prompt_length, len(text.encode())))
            else:
                assert number == numbers[-1]
                assert set(ids[own]) | set(labels[own]) == {EOD}
    return found


@pytest.mark.parametrize("length", [96, 150, 400])
def test_a_packed_epoch_has_every_example_once_and_whole(length: int) -> None:
    batch = epoch(packing=True, sequence_length=length)
    assert batch.documents is not None
    assert batch.documents.dtype == np.int32
    assert batch.input_ids.shape == batch.documents.shape == (len(batch.labels), length)
    assert len(batch.input_ids) < len(EXAMPLES)
    assert sorted(documents(batch), key=lambda e: e.ids) == sorted(EXAMPLES, key=lambda e: e.ids)
    assert batch.num_loss_tokens == sum(example.num_loss_tokens for example in EXAMPLES)


def test_a_full_row_has_no_padding() -> None:
    examples = [Example(list(range(1, n)), 2, 1) for n in (12, 8, 12, 8)]  # 10, 6, 10 and 6 inputs
    batch = HeldoutPairs("pairs", examples, EOD, 16, packing=True).windows(0, 3)
    assert batch.documents is not None
    assert [sorted(set(row)) for row in batch.documents.tolist()] == [[0, 1], [0, 1], [0]]
    assert batch.input_ids[0].tolist() == [*range(1, 11), *range(1, 7)]
    assert batch.labels[0].tolist() == [*range(2, 12), *range(2, 8)]
    assert batch.loss_mask.sum(axis=1).tolist() == [14, 14, 0]


def loss(batch: Batch, model: GPTNeoXForCausalLM) -> float:
    """Per unmasked token."""
    model.parts.documents.start([None if batch.documents is None else Borders.of(torch.from_numpy(batch.documents))])
    ids, labels = (torch.from_numpy(array % 64) for array in (batch.input_ids, batch.labels))
    with torch.no_grad():
        losses = token_losses(model(ids), labels, 64) * torch.from_numpy(batch.loss_mask)
    return losses.sum().item() / batch.num_loss_tokens


def test_the_loss_of_an_epoch_is_that_without_packing() -> None:
    model = GPTNeoXForCausalLM(small(initializer_range=0.3))
    initialize_parameters(model.named_parameters(), model.config, seed=1)
    expected = loss(epoch(), model)
    packed = epoch(packing=True, sequence_length=400)
    assert loss(packed, model) == pytest.approx(expected, rel=1e-5)
    whole_rows = Batch(packed.input_ids, packed.labels, packed.loss_mask, packed.num_loss_tokens)
    assert abs(loss(whole_rows, model) / expected - 1) > 1e-3  # without borders it would not be


def test_the_log_tells_how_full_rows_are(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="megakor"):
        rows = stream(packing=True, sequence_length=150).rows
    full = sum(len(example.ids) - 1 for example in EXAMPLES) / (len(rows.rows) * 150)
    assert f"10 pairs in {len(rows.rows)} rows, {100 * full:.0f} % full" in caplog.text


def test_loss_counts_the_answer_and_the_end_token_and_nothing_else() -> None:
    batch = HeldoutPairs("pairs", EXAMPLES, EOD, 96, packing=False).windows(0, len(PAIRS))
    assert batch.documents is None
    for row, pair in enumerate(PAIRS):
        learnt = batch.labels[row][batch.loss_mask[row] == 1]
        assert learnt.tolist() == [*map(ord, render_answer(pair.answer)), EOD]
        prompt = render_prompt(pair.question, pair.context)
        assert batch.input_ids[row, : len(prompt)].tolist() == list(map(ord, prompt))


@pytest.mark.parametrize("packing", [False, True])
def test_counts_are_of_the_answers(packing: bool) -> None:
    held_out = HeldoutPairs("pairs", EXAMPLES, EOD, 96, packing)
    assert held_out.num_tokens == sum(len(render_answer(pair.answer)) + 1 for pair in PAIRS)
    assert held_out.num_text_bytes == sum(len(render_answer(pair.answer).encode()) for pair in PAIRS)
    assert held_out.windows(0, held_out.num_windows).loss_mask.sum() == held_out.num_tokens
    beyond = held_out.windows(held_out.num_windows - 2, 4)
    assert beyond.loss_mask[2:].sum() == 0
    assert beyond.loss_mask[:2].sum() > 0


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("dp_size", "micro"), [(1, 4), (1, 1), (2, 2), (4, 1)])
def test_every_layout_sees_the_same_global_batch(dp_size: int, micro: int, packing: bool) -> None:
    pairs = stream(packing=packing)
    for step in (0, 1, 5):
        whole = pairs.micro_batches(step, 0, 1, 4)[0]
        parts = [batch for rank in range(dp_size) for batch in pairs.micro_batches(step, rank, dp_size, micro)]
        for name in ("input_ids", "labels", "loss_mask", *(["documents"] if packing else [])):
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, name))
        assert {part.num_loss_tokens for part in parts} == {int(whole.loss_mask.sum())}


@pytest.mark.parametrize("packing", [False, True])
def test_every_epoch_sees_every_row_once_in_another_order(packing: bool) -> None:
    pairs = stream(global_batch_size=1, sequence_length=150, packing=packing)
    count = len(pairs.rows.rows)
    rows = [pairs.micro_batches(step, 0, 1, 1)[0].input_ids.tobytes() for step in range(2 * count)]
    assert len(set(rows[:count])) == count
    assert set(rows[count:]) == set(rows[:count])
    assert rows[count:] != rows[:count]


def test_state_tells_other_pairs_apart() -> None:
    other = PairStream(EXAMPLES[:-1], EOD, seed=7, plan=Plan(4, 96), packing=False)
    assert stream().state(0) == stream().state(0)
    assert stream().state(0) != other.state(0)
    assert stream().state(0) != stream(seed=8).state(0)
    changed = stream(packing=True).state(0)
    assert stream().state(0).keys() == changed.keys()
    assert [key for key, value in stream().state(0).items() if changed[key] != value] == ["pairs.packing"]


def test_pairs_that_do_not_fit_are_left_out_and_none_left_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    lengths = [len(example.ids) for example in EXAMPLES]
    fitting = tokenise(PAIRS, Letters(), min(lengths) - 1)  # type: ignore[arg-type]
    assert [len(example.ids) for example in fitting] == [length for length in lengths if length == min(lengths)]
    with pytest.raises(ValueError, match=r"train\.sequence_length=4 must fit at least one of 10 pairs"):
        tokenise(PAIRS, Letters(), 4)  # type: ignore[arg-type]
