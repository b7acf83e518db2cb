"""Pairs as batches: what is learnt, in which order, and who gets which rows."""

from __future__ import annotations

import numpy as np
import pytest

from megakor.instruct.pairs import Pair
from megakor.instruct.stream import HeldoutPairs, PairStream, tokenise
from megakor.instruct.template import render_answer, render_prompt

EOD = 0


class Letters:
    """One id a character."""

    eod_id = EOD

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


PAIRS = [Pair(f"질문 {index}", "" if index % 2 else "맥락", "답" * (1 + index)) for index in range(10)]
EXAMPLES = tokenise(PAIRS, Letters(), 96)  # type: ignore[arg-type]


def stream(**changes) -> PairStream:
    settings = {"seed": 7, "sequence_length": 96, "global_batch_size": 4} | changes
    return PairStream(EXAMPLES, EOD, **settings)


def test_loss_counts_the_answer_and_the_end_token_and_nothing_else() -> None:
    batch = HeldoutPairs("pairs", EXAMPLES, EOD, 96).windows(0, len(PAIRS))
    for row, pair in enumerate(PAIRS):
        learnt = batch.labels[row][batch.loss_mask[row] == 1]
        assert learnt.tolist() == [*map(ord, render_answer(pair.answer)), EOD]
        prompt = render_prompt(pair.question, pair.context)
        assert batch.input_ids[row, : len(prompt)].tolist() == list(map(ord, prompt))


def test_counts_are_of_the_answers() -> None:
    held_out = HeldoutPairs("pairs", EXAMPLES, EOD, 96)
    assert held_out.num_tokens == sum(len(render_answer(pair.answer)) + 1 for pair in PAIRS)
    assert held_out.num_text_bytes == sum(len(render_answer(pair.answer).encode()) for pair in PAIRS)
    beyond = held_out.windows(8, 4)
    assert beyond.loss_mask[2:].sum() == 0
    assert beyond.loss_mask[:2].sum() > 0


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 4), (1, 1), (2, 2), (4, 1)])
def test_every_layout_sees_the_same_global_batch(dp_size: int, micro: int) -> None:
    for step in (0, 1, 5):
        whole = stream().micro_batches(step, 0, 1, 4)[0]
        parts = [batch for rank in range(dp_size) for batch in stream().micro_batches(step, rank, dp_size, micro)]
        np.testing.assert_array_equal(np.concatenate([part.input_ids for part in parts]), whole.input_ids)
        np.testing.assert_array_equal(np.concatenate([part.loss_mask for part in parts]), whole.loss_mask)
        assert {part.num_loss_tokens for part in parts} == {int(whole.loss_mask.sum())}


def test_an_epoch_sees_every_pair_once() -> None:
    rows = [row for step in range(5) for row in stream(global_batch_size=2).micro_batches(step, 0, 1, 2)[0].input_ids]
    assert len({row.tobytes() for row in rows}) == len(PAIRS)


def test_state_tells_other_pairs_apart() -> None:
    other = PairStream(EXAMPLES[:-1], EOD, seed=7, sequence_length=96, global_batch_size=4)
    assert stream().state() == stream().state()
    assert stream().state() != other.state()
    assert stream().state() != stream(seed=8).state()


def test_pairs_that_do_not_fit_are_left_out_and_none_left_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    lengths = [len(example.ids) for example in EXAMPLES]
    fitting = tokenise(PAIRS, Letters(), min(lengths) - 1)  # type: ignore[arg-type]
    assert [len(example.ids) for example in fitting] == [length for length in lengths if length == min(lengths)]
    with pytest.raises(ValueError, match=r"train\.sequence_length=4 must fit at least one of 10 pairs"):
        tokenise(PAIRS, Letters(), 4)  # type: ignore[arg-type]
