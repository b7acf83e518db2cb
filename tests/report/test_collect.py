"""What is gathered from a folder, and what is said where there is nothing to gather."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megakor.corpus.text import normalize
from megakor.report.collect import SENTENCE, collect
from tests.report.conftest import write_config, write_metrics


def test_steps_done_twice_count_once_with_their_last_record(demo: Path) -> None:
    run = collect(demo).runs[0]
    assert [record["step"] for record in run.steps] == list(range(1, 61))
    attempt_of = {record["step"]: record["attempt"] for record in run.steps}
    assert (attempt_of[30], attempt_of[31], attempt_of[45]) == (1, 2, 2)
    validated = [(record["step"], record["attempt"]) for record in run.validation["heldout"]]
    assert validated == [(10, 1), (20, 1), (30, 1), (40, 2), (50, 2), (60, 2)]
    assert run.resumes == [(30, 45)]


def test_a_line_cut_off_by_a_crash_is_no_record(bare_run: Path) -> None:
    with (bare_run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "attempt": 1, "step": 13, "lo')
    assert collect(bare_run).runs[0].steps[-1]["step"] == 12


def test_checkpoints_are_those_saved_with_the_size_of_those_kept(demo: Path) -> None:
    checkpoints = collect(demo).runs[0].checkpoints
    assert [(checkpoint.step, checkpoint.size) for checkpoint in checkpoints[-2:]] == [(50, None), (60, 1000)]
    assert {checkpoint.seconds for checkpoint in checkpoints} == {0.1}


def test_a_demo_is_the_whole_arc(demo: Path) -> None:
    report = collect(demo)
    assert report.is_demo
    assert report.name == "demo"
    assert [run.title for run in report.runs] == ["Pretraining", "Instruction tuning"]
    assert list(report.shards) == ["train", "heldout"]
    train = report.shards["train"]
    assert report.runs[0].tokens_per_byte == train["num_tokens"] / train["num_text_bytes"]
    assert report.runs[1].tokens_per_byte is None
    assert report.corpus["documents"] > 1
    assert report.summary["seconds"]
    assert report.samples["answers"]


def test_the_pieces_spell_the_sentence(demo: Path) -> None:
    spelt = b"".join(
        bytes([int(piece.text[3:5], 16)]) if piece.is_byte else piece.text.replace("▁", " ").encode()
        for piece in collect(demo).pieces
    )
    assert spelt.decode() == normalize(SENTENCE)[0]


def test_a_single_run_finds_shards_and_corpus_where_its_files_say(demo_once: Path) -> None:
    report = collect(demo_once / "pretrain")
    assert not report.is_demo
    assert report.name == "demo"
    assert len(report.runs) == 1
    assert set(report.shards) == {"train", "heldout"}
    assert report.corpus["documents"] > 1


@pytest.mark.parametrize("part", ["corpus", "tokenizer", "shards", "instruct", "summary.json", "samples.json"])
def test_any_part_of_a_demo_may_be_missing(demo: Path, part: str) -> None:
    path = demo / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    report = collect(demo)
    assert len(report.runs) == (1 if part == "instruct" else 2)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run=.*없음 must be the folder"):
        collect(tmp_path / "없음")


def test_a_run_without_a_step_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run=.* must hold a metrics.jsonl"):
        collect(tmp_path)
    write_config(tmp_path, "early")
    with pytest.raises(ValueError, match=r"run=.* at least one training step"):
        collect(tmp_path)
    write_metrics(tmp_path, [(0, 0)])
    with pytest.raises(ValueError, match=r"run=.* at least one training step"):
        collect(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [("corpus/corpus.json", "{"), ("summary.json", "[1]"), ("samples.json", ""), ("pretrain/config.yaml", "a: [")],
)
def test_a_damaged_file_is_named(demo: Path, name: str, text: str) -> None:
    (demo / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        collect(demo)
