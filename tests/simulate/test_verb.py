"""`megakor simulate` as a user runs it."""

from __future__ import annotations

import json

import pytest

from megakor.config.compose import main
from megakor.simulate.__main__ import run
from tests.config.commands import PRETRAIN, command

LAYOUT = ["model.vocab_size=256", "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"]


def test_json_is_all_that_standard_output_gets() -> None:
    done = command("-m", "megakor", "simulate", *PRETRAIN, *LAYOUT, "world_size=8", "format=json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["world_size"] == 8
    assert figures["dims"] == {"pipeline": 2, "data": 2, "context": 1, "tensor": 2, "sequence_parallel": False}
    assert [stage["holds"] for stage in figures["stages"]] == ["embedding, block 0", "block 1, final norm, output"]
    for stage in figures["stages"]:
        states = stage["weights"] + stage["gradients"] + stage["optimizer"]
        assert stage["memory"] == states + stage["activations"]
        assert {"axis": "tensor", "kind": "all_reduce"}.items() <= stage["micro_batch"][0].items()


def test_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    """Whole, however wide a name is. Without world_size the sizes multiply: an open data_parallel_size is 1."""
    main("simulate", run, [*PRETRAIN, *LAYOUT, "model.num_hidden_layers=3"])
    shown = capsys.readouterr().out
    assert "4 ranks = tensor 2 × pipeline 2 × context 1 × data 1" in shown
    assert "2 stages × 2 tensor ranks hold just these" in shown
    assert "…" not in shown
    rows = [line.split() for line in shown.splitlines()]
    assert sum(row[1:3] == ["tensor", "all_reduce"] for row in rows) == 2
    assert sum(row[1:3] == ["pipeline", "send_hidden_states"] for row in rows) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["world_size=6"], ["parallel.tensor_parallel_size=2", "= 4 must divide", "nearest: 4 or 8 processes"]),
        (["world_size=0"], ["world_size=0 must be above 0"]),
        (["format=yaml"], ["format=yaml must be table or json"]),
        (["model.vocab_size=null", "data.tokenizer=nowhere"], ["tokenizer=nowhere holds no"]),
    ],
    ids=["not a multiple", "zero", "format", "no tokenizer"],
)
def test_errors_are_one_line(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main("simulate", run, [*PRETRAIN, *LAYOUT, *arguments])
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = [line for line in shown.err.splitlines() if "error" in line]
    assert all(word in line for word in words)
