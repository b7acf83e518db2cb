from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakor.data.heldout import HeldoutSet
from tests.data.conftest import EOD, NUM_TOKENS
from tests.data.test_foreign import write_pair


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
    assert heldout.num_text_bytes == heldout.tokens.manifest.num_text_bytes


def test_documents_apart(folder: Path) -> None:
    kept = HeldoutSet("heldout", folder, 7, separate_documents=True).windows(0, 2)
    assert kept.documents is not None
    assert kept.documents.tolist() == [[0, *[1] * 6], [0] * 7]  # an end token stands before the first document


def test_shards_of_other_makers(tmp_path: Path) -> None:
    """How many bytes their text had is not known."""
    write_pair(tmp_path / "set", [[1, 2, 3]])
    with pytest.raises(ValueError, match=r"heldout=.*set must be shards that megakor made"):
        HeldoutSet("heldout", tmp_path / "set", 2)


def test_bad_length(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.sequence_length=0 must be at least 1"):
        HeldoutSet("heldout", folder, 0)
