"""`megakor plan` and `megakor plan search` as a user runs them."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from megakor.cli import main as megakor
from megakor.config.compose import main
from megakor.plan.__main__ import run
from tests.config.commands import command

LARGEST = "experiment=12_8b_256xa100"
TOO_LARGE = ["model=12_8b", "cluster.gpus=64xa100-80g", "train.global_batch_size=512"]


def processor_seconds() -> float:
    """Of the processes that have been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_json_is_all_that_standard_output_gets_and_pytorch_is_not_loaded() -> None:
    code = (
        "import sys; from megakor.cli import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'deepspeed', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    before = processor_seconds()
    done = command("-c", code, "plan", LARGEST, "format=json")
    assert processor_seconds() - before < 3
    assert (done.returncode, done.stderr) == (0, "[]\n")
    figures = json.loads(done.stdout)
    assert figures["parameters"] == 12_893_603_840
    assert figures["memory_gib_per_gpu"] == max(stage["total"] for stage in figures["stages"])
    assert 0 < figures["mfu"] < 1
    assert figures["cost_krw"] == pytest.approx(figures["days"] * 24 * 256 * 2325)
    assert figures["step_seconds"] == pytest.approx(sum(figures["step_seconds_by_part"].values()))
    assert figures["fits"] is True


def test_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    main("plan", run, [LARGEST])
    shown = capsys.readouterr().out
    assert "256 × a100-80g = tensor 4 × pipeline 4 × context 1 × data 16, sequence parallel, ZeRO-1" in shown
    assert "12,893,603,840 parameters: embedding 154,009,600" in shown
    assert "For inference only" in shown
    assert "KRW" in shown
    assert "…" not in shown
    assert sum(line.startswith(("0 ", "1 ", "2 ", "3 ")) for line in shown.splitlines()) == 4


def test_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main("plan", run, [LARGEST, f"picture={tmp_path}/memory.svg"])
    assert (tmp_path / "memory.svg").read_text(encoding="utf-8").startswith("<svg ")


def test_one_that_does_not_fit_says_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main("plan", run, [*TOO_LARGE, "format=json"])
    shown = capsys.readouterr()
    assert ended.value.code == 1
    assert json.loads(shown.out)["fits"] is False
    (line,) = shown.err.splitlines()
    assert line.startswith("megakor plan: error: stage 0 needs ")
    assert "and must fit into the 79.1 GiB of a100-80g: " in line
    assert " GiB too much; parallel.zero_stage=3 takes " in line


def test_search(capsys: pytest.CaptureFixture[str]) -> None:
    megakor(["plan", "search", "model=1_3b", "cluster.gpus=8xa100-80g", "num_rows=3"])
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if line[:2] in ("1 ", "2 ", "3 ", "4 ")]
    assert len(rows) == 3
    assert "Left out:\n" in shown
    pasted = shown.partition("The first as overrides:")[2].split()
    megakor(["plan", "model=1_3b", "cluster.gpus=8xa100-80g", *pasted])
    assert "8 × a100-80g" in capsys.readouterr().out


def test_search_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    megakor(["plan", "search", "model=1_3b", "cluster.gpus=8xa100-80g", "format=json"])
    found = json.loads(capsys.readouterr().out)
    assert len(found["layouts"]) > 20
    assert {"layout", "step_seconds", "mfu", "memory_gib_per_gpu", "bound"} <= found["layouts"][0].keys()


def test_search_where_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        megakor(["plan", "search", "model=12_8b", "cluster.gpus=1xrtx-3090"])
    assert ended.value.code == 1
    assert "cluster.gpus=1xrtx-3090 must hold the model: no layout fits" in capsys.readouterr().err


def test_help_of_a_verb_with_a_subverb_shows_its_own_keys(capsys: pytest.CaptureFixture[str]) -> None:
    megakor(["plan", "--help"])
    assert "picture" in capsys.readouterr().out
    megakor(["plan", "search", "--help"])
    assert "num_rows" in capsys.readouterr().out
