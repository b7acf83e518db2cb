"""Pairs as batches: prompt, answer and end token, the loss on answer and end token only.

    pairs ─► examples ─► rows, packed or of one example each ─► batches

The order of rows is the pretraining stream's pure function, and so is every batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megakor.data.order import ORDER_VERSION, SourceOrder
from megakor.data.plan import Plan
from megakor.data.stream import Batch, share
from megakor.instruct.packing import pack
from megakor.instruct.pairs import Pair
from megakor.instruct.template import render_answer, render_prompt
from megakor.logs import get_logger
from megakor.tokenizer.tokenizer import Tokenizer

log = get_logger(__name__)


@dataclass(frozen=True)
class Example:
    """A tokenised pair: `ids` holds prompt, answer and end token; the first `prompt_length` of them are the prompt."""

    ids: list[int]
    prompt_length: int
    answer_bytes: int

    @property
    def num_loss_tokens(self) -> int:
        return len(self.ids) - self.prompt_length

    @property
    def num_inputs(self) -> int:
        """Positions that it takes in a row: its last token is a label alone."""
        return len(self.ids) - 1


def tokenise(pairs: Sequence[Pair], tokenizer: Tokenizer, sequence_length: int) -> list[Example]:
    """Examples that fit into `sequence_length`; longer pairs are left out and counted in the log.

    Raises:
        ValueError: none fits.
    """
    examples = []
    for pair in pairs:
        prompt = tokenizer.encode(render_prompt(pair.question, pair.context))
        answer = render_answer(pair.answer)
        ids = [*prompt, *tokenizer.encode(answer), tokenizer.eod_id]
        if len(ids) <= sequence_length + 1:
            examples.append(Example(ids, len(prompt), len(answer.encode())))
    if pairs and not examples:
        raise ValueError(f"train.sequence_length={sequence_length} must fit at least one of {len(pairs)} pairs")
    if len(examples) < len(pairs):
        left_out = len(pairs) - len(examples)
        log.warning("%d of %d pairs are longer than %d tokens and left out", left_out, len(pairs), sequence_length)
    return examples


class Rows:
    """Examples laid out in rows; each is a document of its row, and what is left of a row is another.

    Args:
        examples: tokenised pairs that fit.
        eod_id: end token, which also pads.
        sequence_length: tokens in a row.
        packing: whether examples share rows.
    """

    def __init__(self, examples: Sequence[Example], eod_id: int, sequence_length: int, packing: bool) -> None:
        self.eod_id, self.sequence_length, self.packing = eod_id, sequence_length, packing
        lengths = [example.num_inputs for example in examples]
        shared = pack(lengths, sequence_length) if packing else [[number] for number in range(len(examples))]
        self.rows = [[examples[number] for number in numbers] for numbers in shared]
        self.fill = sum(lengths) / max(1, len(self.rows) * sequence_length)

    def num_loss_tokens(self, rows: Sequence[int]) -> int:
        """Unmasked labels of rows."""
        return sum(example.num_loss_tokens for row in rows for example in self.rows[row])

    def batch(self, rows: Sequence[int], count: int, num_loss_tokens: int) -> Batch:
        """Rows as a batch of `count`; missing rows and padding are end tokens with mask 0.

        An example's inputs are all its tokens but the last, its labels all but the first: no label is of another.
        Alone in its row, an example has nothing before it, so rows that are not packed say nothing of documents.
        """
        shape = count, self.sequence_length
        inputs, labels = (np.full(shape, self.eod_id, dtype=np.int64) for _ in range(2))
        mask, documents = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.int32)
        for index, row in enumerate(rows):
            start = 0
            for number, example in enumerate(self.rows[row]):
                end = start + example.num_inputs
                inputs[index, start:end] = example.ids[:-1]
                labels[index, start:end] = example.ids[1:]
                mask[index, start + example.prompt_length - 1 : end] = 1.0
                documents[index, start:end] = number
                start = end
            documents[index, start:] = len(self.rows[row])
        return Batch(inputs, labels, mask, num_loss_tokens, documents if self.packing else None)


class PairStream:
    """The endless shuffled stream of rows of pairs.

    Args:
        examples: tokenised training pairs.
        eod_id: end token, which also pads.
        seed: seed of the order.
        plan: rows of each step, and tokens of a row.
        packing: whether pairs share rows.
    """

    def __init__(self, examples: Sequence[Example], eod_id: int, *, seed: int, plan: Plan, packing: bool) -> None:
        self.examples, self.seed, self.plan = examples, seed, plan
        self.rows = Rows(examples, eod_id, plan.sequence_length, packing)
        num_rows = len(self.rows.rows)
        self.order = SourceOrder(np.array([num_rows]), seed=seed, name="pairs", window=num_rows)  # long rows come first
        log.info("%d pairs in %d rows, %.0f %% full", len(examples), num_rows, 100 * self.rows.fill)

    def micro_batches(self, step: int, dp_rank: int, dp_size: int, micro_batch_size: int) -> list[Batch]:
        """Data rank `dp_rank`'s micro-batches of global batch `step`, counted from 0; dealt as pretraining's are."""
        taken = self.plan.step(step)
        chosen = self.order.at(np.arange(taken.start, taken.start + taken.size)).samples.tolist()
        num_loss_tokens = self.rows.num_loss_tokens(chosen)
        first, last = share(taken.size, dp_rank, dp_size)
        own, num_micro_batches = chosen[first:last], -(-taken.size // (dp_size * micro_batch_size))
        return [
            self.rows.batch(own[start : start + micro_batch_size], micro_batch_size, num_loss_tokens)
            for start in range(0, num_micro_batches * micro_batch_size, micro_batch_size)
        ]

    def state(self, step: int) -> dict[str, Any]:
        """What the batches before a step depend on, by configuration key; a run that goes on must have the same."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(np.asarray([example.prompt_length, *example.ids], dtype=np.int64).tobytes())
        return {
            "order_version": ORDER_VERSION,
            "train.seed": self.seed,
            "train.sequence_length": self.plan.sequence_length,
            "train.global_batch_size": self.plan.state(step)["train.global_batch_size"],
            "pairs.files": digest.hexdigest(),
            "pairs.packing": self.rows.packing,
        }


class HeldoutPairs:
    """Held-out pairs; only answers and end tokens count."""

    def __init__(
        self, name: str, examples: Sequence[Example], eod_id: int, sequence_length: int, packing: bool
    ) -> None:
        self.name, self.sequence_length = name, sequence_length
        self.rows = Rows(examples, eod_id, sequence_length, packing)
        self.num_windows = len(self.rows.rows)
        self.num_tokens = sum(example.num_loss_tokens for example in examples)
        self.num_text_bytes = sum(example.answer_bytes for example in examples)

    def windows(self, start: int, count: int) -> Batch:
        """Rows start … start + count - 1; rows past the last are masked whole."""
        chosen = range(self.num_windows)[start : start + count]
        return self.rows.batch(chosen, count, self.num_tokens)
