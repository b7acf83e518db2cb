"""Pairs as batches: prompt, answer and end token in one row, the loss on answer and end token only.

The order is the pretraining stream's pure function, and so is every batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megakor.data.order import ORDER_VERSION, sample_ids
from megakor.data.stream import Batch
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


def pad(examples: Sequence[Example], rows: int, sequence_length: int, eod_id: int, num_loss_tokens: int) -> Batch:
    """Examples as a batch of `rows` rows [rows, seq]; missing rows and padding are end tokens with mask 0."""
    tokens = np.full((rows, sequence_length + 1), eod_id, dtype=np.int64)
    mask = np.zeros((rows, sequence_length), dtype=np.float32)
    for row, example in enumerate(examples):
        tokens[row, : len(example.ids)] = example.ids
        mask[row, example.prompt_length - 1 : len(example.ids) - 1] = 1.0
    return Batch(np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:]), mask, num_loss_tokens)


class PairStream:
    """The endless shuffled stream of pairs.

    Args:
        examples: tokenised training pairs.
        eod_id: end token, which also pads.
        seed: seed of the order.
        sequence_length: tokens in a row.
        global_batch_size: rows in a step.
    """

    def __init__(
        self, examples: Sequence[Example], eod_id: int, *, seed: int, sequence_length: int, global_batch_size: int
    ) -> None:
        self.examples, self.eod_id, self.seed = examples, eod_id, seed
        self.sequence_length, self.global_batch_size = sequence_length, global_batch_size
        self.num_tokens_per_step = global_batch_size * sequence_length

    def micro_batches(self, step: int, dp_rank: int, dp_size: int, micro_batch_size: int) -> list[Batch]:
        """Data rank `dp_rank`'s micro-batches of global batch `step`, counted from 0."""
        start = step * self.global_batch_size
        chosen = sample_ids(self.seed, len(self.examples), start, self.global_batch_size)
        batch = [self.examples[index] for index in chosen]
        num_loss_tokens = sum(example.num_loss_tokens for example in batch)
        part = self.global_batch_size // dp_size
        own = batch[dp_rank * part : (dp_rank + 1) * part]
        return [
            pad(own[first : first + micro_batch_size], micro_batch_size, self.sequence_length, self.eod_id,
                num_loss_tokens)
            for first in range(0, part, micro_batch_size)
        ]  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What every batch depends on besides its step, by configuration key; a resumed run must have the same."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(np.asarray([example.prompt_length, *example.ids], dtype=np.int64).tobytes())
        return {
            "order_version": ORDER_VERSION,
            "train.seed": self.seed,
            "train.sequence_length": self.sequence_length,
            "train.global_batch_size": self.global_batch_size,
            "pairs.files": digest.hexdigest(),
        }


class HeldoutPairs:
    """Held-out pairs; only answers and end tokens count."""

    def __init__(self, name: str, examples: Sequence[Example], eod_id: int, sequence_length: int) -> None:
        self.name, self.examples, self.eod_id, self.sequence_length = name, examples, eod_id, sequence_length
        self.num_windows = len(examples)
        self.num_tokens = sum(example.num_loss_tokens for example in examples)
        self.num_text_bytes = sum(example.answer_bytes for example in examples)

    def windows(self, start: int, count: int) -> Batch:
        """Pairs start … start + count - 1 as rows; rows past the last pair are masked whole."""
        return pad(self.examples[start : start + count], count, self.sequence_length, self.eod_id, self.num_tokens)
