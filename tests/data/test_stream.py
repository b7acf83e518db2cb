from __future__ import annotations

import itertools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakor.data import stream as stream_module
from megakor.data.manifest import load_manifest
from megakor.data.order import sample_ids
from megakor.data.stream import Batch, HeldoutSet, PretrainStream, TokenStream
from tests.data.tokens import write_shards

EOD = 60_000 - 1
NUM_TOKENS = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token i of the stream is i, in shards and documents of uneven lengths."""
    folder = tmp_path_factory.mktemp("shards")
    shards = []
    cuts = [0, 1, 7, 300, 301, 640, NUM_TOKENS]
    for start, end in itertools.pairwise(cuts):
        middle = (start + end) // 2
        documents = [list(range(start, middle)), list(range(middle, end))]
        shards.append([document for document in documents if document])
    write_shards(folder, shards, eod_id=EOD)
    return folder


def rows(batches: list[Batch]) -> np.ndarray:
    return np.concatenate([batch.input_ids for batch in batches])


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 100), st.integers(1, 2**40), st.sampled_from([1, 3, 8, 64, 333]))
def test_ranks_and_micro_batches_change_nothing(folder: Path, step: int, seed: int, length: int) -> None:
    size = 12
    stream = PretrainStream(folder, seed=seed, sequence_length=length, global_batch_size=size)
    expected = sample_ids(seed, stream.num_samples, step * size, size)
    for dp_size in (1, 2, 3, 4, 6, 12):
        for micro in (size for size in (1, 2, 3, 12) if 12 % (dp_size * size) == 0):
            parts = [stream.micro_batches(step, rank, dp_size, micro) for rank in range(dp_size)]
            assert {batch.input_ids.shape for part in parts for batch in part} == {(micro, length)}
            assert np.array_equal(np.concatenate([rows(part) for part in parts])[:, 0], expected * length)


def test_samples_cross_documents_and_shards(folder: Path) -> None:
    stream = TokenStream(folder)
    for length in (1, 7, 333, 999):
        count = stream.num_samples(length)
        assert count == 999 // length
        for index in range(count):
            assert stream.sample(index, length).tolist() == list(range(index * length, (index + 1) * length + 1))


def test_an_epoch_shows_every_sample_once(folder: Path) -> None:
    stream = PretrainStream(folder, seed=5, sequence_length=9, global_batch_size=3)  # 111 samples, 37 steps
    seen = np.concatenate([rows(stream.micro_batches(step, 0, 1, 3)) for step in range(37)])
    assert sorted(seen[:, 0].tolist()) == list(range(0, 999, 9))


def test_batch(folder: Path) -> None:
    stream = PretrainStream(folder, seed=5, sequence_length=9, global_batch_size=8)
    (batch, _) = stream.micro_batches(2, 1, 2, 2)
    assert np.array_equal(batch.labels, batch.input_ids + 1)
    assert batch.input_ids.dtype == batch.labels.dtype == np.int64
    assert batch.loss_mask.dtype == np.float32
    assert batch.loss_mask.min() == 1
    assert batch.num_loss_tokens == stream.num_tokens_per_step == 72  # of the global batch, not of this part


def test_state_is_what_every_batch_depends_on(folder: Path) -> None:
    stream = PretrainStream(folder, seed=5, sequence_length=9, global_batch_size=8)
    assert stream.state() == {
        "order_version": 1,
        "train.seed": 5,
        "train.sequence_length": 9,
        "train.global_batch_size": 8,
        "data.train": load_manifest(folder).fingerprint(),
    }


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 1100), st.integers(1, 7))
def test_heldout_predicts_every_token_once(folder: Path, length: int, count: int) -> None:
    heldout = HeldoutSet("heldout", folder, length)
    predicted, contexts = [], []
    for start in range(0, heldout.num_windows + count, count):  # goes past the end
        batch = heldout.windows(start, count)
        assert batch.labels.shape == (count, length)
        assert batch.num_loss_tokens == NUM_TOKENS
        predicted += batch.labels[batch.loss_mask == 1].tolist()
        contexts += batch.input_ids[batch.loss_mask == 1].tolist()
    assert predicted == list(range(NUM_TOKENS))
    assert contexts == [EOD, *range(NUM_TOKENS - 1)]
    assert (heldout.num_tokens, heldout.num_windows) == (NUM_TOKENS, -(-NUM_TOKENS // length))
    assert heldout.num_text_bytes == load_manifest(folder).num_text_bytes


def test_few_open_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of shards must not use up the descriptors."""
    monkeypatch.setattr(stream_module, "MAX_OPEN_SHARDS", 2)
    stream = TokenStream(folder)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for _ in range(3):
        assert stream.read(0, NUM_TOKENS).tolist() == list(range(NUM_TOKENS))
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_pickles_small(folder: Path) -> None:
    stream = PretrainStream(folder, seed=5, sequence_length=9, global_batch_size=8)
    batches = stream.micro_batches(0, 0, 1, 8)
    data = pickle.dumps(stream)
    assert len(data) < 1000
    assert np.array_equal(rows(pickle.loads(data).micro_batches(0, 0, 1, 8)), rows(batches))


@pytest.mark.parametrize(
    ("dp_rank", "dp_size", "micro", "message"),
    [
        (0, 5, 1, r"train\.global_batch_size=8 must be divisible by data_parallel_size=5"),
        (0, 2, 3, r"train\.global_batch_size=8 must be divisible by .*train\.micro_batch_size=3"),
        (0, 1, 0, r"train\.micro_batch_size=0"),
        (2, 2, 1, "dp_rank=2"),
    ],
)
def test_sizes_that_do_not_divide(folder: Path, dp_rank: int, dp_size: int, micro: int, message: str) -> None:
    stream = PretrainStream(folder, seed=5, sequence_length=9, global_batch_size=8)
    with pytest.raises(ValueError, match=message):
        stream.micro_batches(0, dp_rank, dp_size, micro)


def test_sequence_longer_than_the_set(folder: Path) -> None:
    with pytest.raises(ValueError, match="sequence_length=1000 must be below the number of tokens.*: 1000"):
        PretrainStream(folder, seed=5, sequence_length=1000, global_batch_size=8)
