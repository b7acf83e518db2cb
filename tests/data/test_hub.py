from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megakor.data.hub import DatasetStream
from megakor.data.plan import Plan
from tests.data.test_stream import equal, whole
from tests.data.tokens import ByteTokenizer

TEXTS = [f"{number}번째 글. " * (1 + number % 5) for number in range(40)]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dataset") / "글.jsonl"
    path.write_text("".join(json.dumps({"글": text}, ensure_ascii=False) + "\n" for text in TEXTS))
    return path


def made(records: Path, plan: Plan | None = None, **changes: Any) -> DatasetStream:
    arguments = {"path": "json", "data_files": str(records), "split": "train"}
    settings: dict[str, Any] = {"text_key": "글", "shuffle_buffer": 8, "seed": 5} | changes
    return DatasetStream(arguments, tokenizer=ByteTokenizer(), plan=plan or Plan(6, 20), **settings)


def test_an_epoch_is_the_dataset(records: Path) -> None:
    """In its own order: every token, laid end to end."""
    stream = made(records, shuffle_buffer=0)
    tokens = [token for text in TEXTS for token in [*text.encode(), 256]]
    inputs = np.concatenate([whole(stream, step)[0].ravel() for step in range(3)])
    assert inputs.tolist() == tokens[: len(inputs)]


def test_every_way_of_dealing_and_entering_gives_the_same(records: Path) -> None:
    plan = Plan(6, 20, {12: 4}, {8: 5}, [[20, 30]])
    straight = made(records, plan)
    expected = [whole(straight, step) for step in range(12)]  # goes over an epoch's end
    for step in (11, 0, 7):
        fresh = made(records, plan)
        for dp_size, micro in ((1, 1), (2, 1), (4, 2), (9, 1)):
            assert equal(whole(fresh, step, dp_size, micro), expected[step])


def test_epochs_and_seeds_differ(records: Path) -> None:
    first = [whole(made(records), step)[0] for step in range(3)]
    assert not all(np.array_equal(a, whole(made(records, seed=6), step)[0]) for step, a in enumerate(first))


def test_documents(records: Path) -> None:
    (batch, *_) = made(records, separate_documents=True).micro_batches(0, 0, 1, 3)
    assert batch.documents is not None
    ends = batch.input_ids == 256
    assert np.array_equal(np.diff(batch.documents, axis=1), ends[:, :-1].astype(int))


def test_state(records: Path) -> None:
    assert made(records).state(3) == made(records).state(3)
    assert made(records).state(3)["data.dataset"]["path"] == "json"
    assert made(records, seed=6).state(3) != made(records).state(3)


def test_bad_datasets(records: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.text_key=text must be a text column of data\.dataset: \['글'\]"):
        made(records, text_key="text").micro_batches(0, 0, 1, 1)
    stream = made(records)
    del stream.arguments["split"]
    with pytest.raises(ValueError, match=r"data\.dataset=.* must name a split: it has train"):
        stream.micro_batches(0, 0, 1, 1)
