"""A Hugging Face dataset, tokenised while it is read: for small jobs, without shards.

The same batches come on any number of ranks, and again after a new start. What shards have and this has not:

- a place in the middle is reached by reading and tokenising all that comes before it;
- every rank reads and tokenises everything, so nothing is gained by more nodes;
- the order is that of a shuffle buffer, not of the whole set, and no step can be traced to its documents;
- a dataset that has changed since the run began is not noticed: the arguments that loaded it are compared, not it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from megakor.config.schema import DataConfig, TrainConfig
from megakor.corpus.text import normalize
from megakor.data.plan import Plan
from megakor.data.source import Source
from megakor.data.stream import Batch, documents_of, share


class TokenizerLike(Protocol):
    """What is needed of a tokenizer."""

    @property
    def eod_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...


class DatasetStream:
    """The endless stream of a dataset's tokens, cut into samples that share one token with their neighbours.

    Args:
        arguments: of `datasets.load_dataset`; `streaming` is set.
        text_key: column of the text.
        shuffle_buffer: records among which each is drawn; 0: the dataset's own order.
        tokenizer: that tokenises it.
        plan: of the run's steps.
        seed: of the shuffle.
        separate_documents: whether positions begin anew, and attention ends, where a document does.
    """

    files = None

    def __init__(
        self,
        arguments: Mapping[str, Any],
        *,
        text_key: str,
        shuffle_buffer: int,
        tokenizer: TokenizerLike,
        plan: Plan,
        seed: int,
        separate_documents: bool = False,
    ) -> None:
        self.arguments, self.text_key, self.shuffle_buffer = dict(arguments), text_key, shuffle_buffer
        self.tokenizer, self.plan, self.seed, self.separate_documents = tokenizer, plan, seed, separate_documents
        self.sources: dict[str, Source] = {}
        self._samples, self._read = self._read_samples(), 0

    def close(self) -> None:
        """There is nothing to close."""

    def micro_batches(self, step: int, dp_rank: int, dp_size: int, micro_batch_size: int) -> list[Batch]:
        """Data rank `dp_rank`'s micro-batches of global batch `step`, from 0; dealt as those of shards are."""
        taken, length, eod = self.plan.step(step), self.plan.sequence_length, self.tokenizer.eod_id
        first, last = share(taken.size, dp_rank, dp_size)
        positions = self.plan.positions(np.arange(taken.start, taken.start + taken.size)).tolist()
        own = [sample for number, sample in enumerate(map(self._sample, positions)) if first <= number < last]
        num_micro_batches = -(-taken.size // (dp_size * micro_batch_size))
        tokens = np.full((num_micro_batches * micro_batch_size, length + 1), eod, dtype=np.int64)
        mask = np.zeros((len(tokens), length), dtype=np.float32)
        if own:
            tokens[: len(own)], mask[: len(own)] = own, 1.0
        cut = (num_micro_batches, micro_batch_size * length // taken.sequence_length, taken.sequence_length)
        inputs, labels, masks = (values.reshape(cut) for values in (tokens[:, :-1], tokens[:, 1:], mask))
        return [
            Batch(
                inputs[part], labels[part], masks[part], taken.size * length,
                documents_of(inputs[part], eod) if self.separate_documents else None,
            )
            for part in range(num_micro_batches)
        ]  # fmt: skip

    def state(self, step: int) -> dict[str, Any]:
        """What the batches before a step depend on, by configuration key, as far as it is known."""
        return {
            "train.seed": self.seed,
            "train.sequence_length": self.plan.sequence_length,
            **self.plan.state(step),
            "data.separate_documents": self.separate_documents,
            "data.shuffle_buffer": self.shuffle_buffer,
            "data.text_key": self.text_key,
            "data.dataset": self.arguments,
        }

    def _sample(self, position: int) -> np.ndarray:
        """Sample `position` of the stream: int64 [sequence_length + 1]. Going back means to begin again."""
        if position < self._read:
            self._samples, self._read = self._read_samples(), 0
        while True:
            sample = next(self._samples)
            self._read += 1
            if self._read > position:
                return sample

    def _read_samples(self) -> Iterator[np.ndarray]:
        """All samples, epoch after epoch; the token after one is the first of the next."""
        length, held = self.plan.sequence_length, np.empty(0, np.int64)
        for document in self._documents():
            held = np.concatenate([held, document])
            while len(held) > length:
                yield held[: length + 1]
                held = held[length:]

    def _documents(self) -> Iterator[np.ndarray]:
        """The tokens of each document, closed by the end token."""
        from datasets import load_dataset  # here alone: slow to import

        dataset = load_dataset(**self.arguments, streaming=True)
        if not hasattr(dataset, "take"):
            raise ValueError(f"data.dataset={self.arguments} must name a split: it has {', '.join(dataset)}")
        if self.shuffle_buffer:
            dataset = dataset.shuffle(seed=self.seed % 2**32, buffer_size=self.shuffle_buffer)
        epoch = 0
        while True:
            dataset.set_epoch(epoch)
            count = 0
            for record in dataset:
                text = record.get(self.text_key)
                if not isinstance(text, str):
                    columns = list(record)
                    raise ValueError(f"data.text_key={self.text_key} must be a text column of data.dataset: {columns}")
                yield np.array([*self.tokenizer.encode(normalize(text)[0]), self.tokenizer.eod_id])
                count += 1
            if not count:
                raise ValueError(f"data.dataset={self.arguments} must have records, and has none")
            epoch += 1


def dataset_stream(data: DataConfig, train: TrainConfig, tokenizer: TokenizerLike) -> DatasetStream:
    """The stream of a run on `data.dataset`."""
    return DatasetStream(
        data.dataset,
        text_key=data.text_key,
        shuffle_buffer=data.shuffle_buffer,
        tokenizer=tokenizer,
        plan=Plan(train.global_batch_size, train.sequence_length, train.batch_sizes, train.sequence_lengths, data.skip),
        seed=train.seed,
        separate_documents=data.separate_documents,
    )
