"""The stream: one and the same for every way of dealing it, entered anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakor.config.schema import DataConfig, TrainConfig
from megakor.data.source import Source
from megakor.data.stream import PretrainStream, pretrain_stream
from tests.data.conftest import CUTS, EOD
from tests.data.tokens import write_shards


class Sizes:
    """Of a tokenizer."""

    vocab_size, eod_id = 60_000, EOD


DATA_KEYS = DataConfig.__dataclass_fields__


def made(folder: Path | dict[str, Path], **keys: Any) -> PretrainStream:
    """A stream with these keys of `data` and `train`."""
    data: dict[str, Any] = {"tokenizer": "unused", "num_streams": 4, "shuffle_window": 20}
    data |= (
        {"sources": {name: str(path) for name, path in folder.items()}}
        if isinstance(folder, dict)
        else {"train": str(folder)}
    )
    train: dict[str, Any] = {"seed": 5, "num_steps": 1, "global_batch_size": 8, "sequence_length": 9}
    train["micro_batch_size"] = 1
    for name, value in keys.items():
        (data if name in DATA_KEYS else train)[name] = value
    return pretrain_stream(DataConfig(**data), TrainConfig(**train), Sizes(), Path("there/is/none"))


def whole(stream: PretrainStream, step: int, dp_size: int = 1, micro: int = 1) -> tuple[np.ndarray, ...]:
    """Inputs, labels and mask of the global batch as ranks see it, without what fills it up."""
    parts = [stream.micro_batches(step, rank, dp_size, micro) for rank in range(dp_size)]
    assert len({len(part) for part in parts}) == 1
    batches = [batch for part in parts for batch in part]
    assert len({batch.input_ids.shape for batch in batches}) == 1
    joined = [np.concatenate([getattr(batch, name) for batch in batches])
              for name in ("input_ids", "labels", "loss_mask")]  # fmt: skip
    assert {batch.num_loss_tokens for batch in batches} == {int(joined[2].sum())}
    rows = joined[2].any(axis=1)
    return tuple(values[rows] for values in joined)


def equal(left: tuple[np.ndarray, ...], right: tuple[np.ndarray, ...]) -> bool:
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@settings(deadline=None, max_examples=40)
@given(
    step=st.integers(0, 10**6),
    seed=st.integers(-(2**40), 2**40),
    size=st.integers(1, 30),
    num_streams=st.sampled_from([1, 4, 64]),
    weights=st.tuples(st.integers(1, 9), st.integers(0, 9)),
)
def test_every_way_of_dealing_gives_the_same_batch(
    folder: Path, small: Path, step: int, seed: int, size: int, num_streams: int, weights: tuple[int, int]
) -> None:
    """Any number of ranks, also one that divides nothing, and any micro-batch."""
    stream = made(
        {"위키": folder, "small": small}, seed=seed, global_batch_size=size, num_streams=num_streams,
        weights={"위키": weights[0], "small": weights[1]},
    )  # fmt: skip
    expected = whole(stream, step)
    assert len(expected[0]) == size
    for dp_size, micro in ((2, 1), (3, 1), (3, 2), (7, 1), (size, 1), (1, size), (31, 3)):
        assert equal(whole(stream, step, dp_size, micro), expected)


def test_entered_at_fifty_points_on_other_ranks(folder: Path, small: Path) -> None:
    """What a new stream sees is byte for byte what the first would have seen. `test_killed` kills processes."""
    keys: dict[str, Any] = {
        "temperature": 2.0, "batch_sizes": {40: 3, 100: 5}, "sequence_lengths": {30: 3}, "skip": [[50, 70], [200, 201]],
        "curriculum": {2700: {"a": 1, "b": 3}},
    }  # fmt: skip
    sources = {"a": folder, "b": small}
    reference = [whole(made(sources, **keys), step) for step in range(120)]
    generator = np.random.default_rng(3)
    for point in generator.choice(110, 50, replace=False):
        dp_size, micro = int(generator.integers(1, 12)), int(generator.integers(1, 4))
        stream = made(sources, **keys)
        for step in range(point, point + 3):
            assert equal(whole(stream, step, dp_size, micro), reference[step]), (step, dp_size, micro)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 50), st.integers(1, 200), st.sampled_from([1, 4, 64]), st.sampled_from([1, 7, 1000]))
def test_an_epoch_predicts_every_token_once(
    folder: Path, epoch: int, length: int, num_streams: int, shuffle_window: int
) -> None:
    """But for the first of each shard, which nothing comes before."""
    stream = made(folder, sequence_length=length, num_streams=num_streams, shuffle_window=shuffle_window,
                  global_batch_size=1)  # fmt: skip
    num_samples = stream.orders[0].num_samples
    seen: list[int] = []
    for step in range(epoch * num_samples, (epoch + 1) * num_samples):
        _, labels, mask = whole(stream, step)
        seen += labels[mask == 1].tolist()
    assert sorted(seen) == sorted(set(range(1000)) - set(CUTS))


def test_sources_come_by_their_weights(folder: Path, small: Path) -> None:
    def drawn(**keys: Any) -> float:
        stream = made({"a": folder, "b": small}, global_batch_size=640, **keys)
        return float(np.mean(stream.rows(1).sources))

    assert drawn(weights={"a": 3.0, "b": 1.0}) == 0.25
    assert drawn() == pytest.approx(171 / 1171, abs=1 / 64)
    assert drawn(temperature=1e9) == pytest.approx(1 / 2, abs=1 / 64)
    assert drawn(max_epochs={"b": 2}) < 0.02  # its 26 samples are used up in the step before
    assert drawn(curriculum={640 * 9: {"a": 0.0, "b": 1.0}}) == 1


def test_more_than_the_sources_may_give(folder: Path, small: Path) -> None:
    stream = made({"a": folder, "b": small}, max_epochs={"a": 3, "b": 3}, num_steps=40)
    assert stream.mixture.end is not None
    assert 40 * 8 <= stream.mixture.end <= 3 * (stream.orders[0].num_samples + stream.orders[1].num_samples)
    with pytest.raises(ValueError, match=r"train\.num_steps=60 takes 480 samples, .* at most the \d+ that data.max_ep"):
        made({"a": folder, "b": small}, max_epochs={"a": 3, "b": 3}, num_steps=60)


def test_less_than_a_block_of_a_source(folder: Path, small: Path) -> None:
    """Such a source would never be drawn from, and nobody would be told."""
    with pytest.raises(ValueError, match=r"data\.max_epochs\.b=1 must leave more than 20 samples"):
        made({"a": folder, "b": small}, max_epochs={"b": 1}, weights={"a": 1.0, "b": 9.0})


def test_batch(folder: Path) -> None:
    (batch, _) = made(folder, sequence_length=20).micro_batches(2, 1, 2, 2)
    counts = batch.loss_mask == 1
    assert np.array_equal(batch.labels[counts], batch.input_ids[counts] + 1)
    assert (batch.labels[~counts] == EOD).all()
    assert batch.input_ids.dtype == batch.labels.dtype == np.int64
    assert batch.loss_mask.dtype == np.float32


def test_shorter_rows_have_the_same_tokens(folder: Path) -> None:
    """A step's samples are cut: as many tokens, in the same order."""
    short, long = made(folder, sequence_length=12, sequence_lengths={16: 4}), made(folder, sequence_length=12)
    for step, length in ((0, 4), (1, 4), (2, 12)):
        for dp_size, micro in ((1, 2), (3, 2)):
            parts = [stream.micro_batches(step, 0, dp_size, micro) for stream in (short, long)]
            flat = [[np.concatenate([values.ravel() for values in map(name, part)]) for part in parts]
                    for name in (lambda batch: batch.input_ids, lambda batch: batch.labels,
                                 lambda batch: batch.loss_mask)]  # fmt: skip
            assert all(np.array_equal(*pair) for pair in flat)
            assert parts[0][0].input_ids.shape == (micro * 12 // length, length)
            assert parts[0][0].num_loss_tokens == parts[1][0].num_loss_tokens


def test_state_is_what_the_batches_before_depend_on(folder: Path) -> None:
    stream = made(folder)
    assert stream.state(5) == {
        "order_version": 2,
        "train.seed": 5,
        "train.sequence_length": 9,
        "train.global_batch_size": 8,
        "train.sequence_lengths": [],
        "data.separate_documents": False,
        "data.num_streams": 4,
        "data.shuffle_window": 20,
        "data.skip": [],
        "data.weights": [[0, {"": "1"}]],
        "data.train": Source(folder).manifest.fingerprint(),
    }
    assert made(folder, skip=[[40, 48]]).state(5) == stream.state(5)
    assert made(folder, skip=[[39, 41]]).state(5) != stream.state(5)


@pytest.mark.parametrize(("dp_rank", "dp_size", "micro", "message"), [
    (0, 1, 0, r"train\.micro_batch_size=0"),
    (2, 2, 1, "dp_rank=2"),
])  # fmt: skip
def test_bad_ranks(folder: Path, dp_rank: int, dp_size: int, micro: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(folder).micro_batches(0, dp_rank, dp_size, micro)


def test_sequence_longer_than_any_shard(folder: Path) -> None:
    with pytest.raises(ValueError, match="sequence_length=360 must be below .* tokens in a shard of .*: 360"):
        made(folder, sequence_length=360)


def test_documents_end_with_their_token(tmp_path: Path) -> None:
    write_shards(tmp_path, [[[1, 2, EOD], [3, EOD], [4, 5, 6, EOD]]], eod_id=EOD)
    (batch,) = made(tmp_path, sequence_length=4, global_batch_size=2, separate_documents=True).micro_batches(0, 0, 1, 2)
    assert batch.documents is not None
    assert batch.documents.dtype == np.int32
    found = {
        tuple(ids): numbers for ids, numbers in zip(batch.input_ids.tolist(), batch.documents.tolist(), strict=True)
    }
    assert found == {(1, 2, EOD, 3): [0, 0, 0, 1], (EOD, 4, 5, 6): [0, 1, 1, 1]}
    assert made(tmp_path, sequence_length=4, global_batch_size=2).micro_batches(0, 0, 1, 2)[0].documents is None
