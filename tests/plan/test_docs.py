"""docs/plan.md shows what the commands print."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import pytest

from megakor.cli import main
from tests.config.commands import ROOT
from tests.documents import Block, blocks

SHOWN = [
    (command, output)
    for command, output in itertools.pairwise(blocks(ROOT / "docs" / "plan.md"))
    if command.text.startswith("megakor plan ") and output.language == "text"
]


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command.text.strip() for command, _ in SHOWN])
def test_outputs(command: Block, output: Block, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = command.commands
    try:
        main(shlex.split(line)[1:])
        printed = capsys.readouterr().out
    except SystemExit:  # it does not fit
        printed = capsys.readouterr().err
    assert [row.rstrip() for row in printed.splitlines()] == output.text.splitlines()


def test_the_picture(tmp_path: Path) -> None:
    main(["plan", "experiment=12_8b_256xa100", f"picture={tmp_path}/plan.svg"])
    assert (tmp_path / "plan.svg").read_bytes() == (ROOT / "docs" / "images" / "plan.svg").read_bytes()


def test_there_is_something_to_compare() -> None:
    assert len(SHOWN) == 3
