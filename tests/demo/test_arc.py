"""The demo: the whole pipeline at a small size with real processes, and its own guards."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megakor.config.schema import DemoConfig
from megakor.demo.arc import MARKER, Arc, resume_figures, training_figures
from megakor.demo.commands import StageError, override, run, run_and_kill
from megakor.train.metrics import METRICS

MOST_SECONDS = 60
"""Of the arc at its small size, on two cores."""

SUMMARY_KEYS = {
    "seconds", "tokens_per_second", "mfu", "first_loss", "last_loss", "bits_per_byte", "order0_bits_per_byte",
    "unigram_bits_per_byte", "instruct_first_loss", "instruct_last_loss", "resume_bitwise_equal",
    "export_max_logit_difference",
}  # fmt: skip


@pytest.mark.alone
def test_the_whole_arc_at_a_small_size(tmp_path: Path) -> None:
    """Two pipeline stages on our own text files; the README's commands run the data-parallel layout."""
    texts = tmp_path / "말뭉치"
    texts.mkdir()
    source = (Path(__file__).parents[2] / "megakor/corpus/sample/encyclopedia.jsonl").read_text(encoding="utf-8")
    (texts / "백과.jsonl").write_text("".join(line + "\n" for line in source.splitlines()[:40]), encoding="utf-8")
    folder = tmp_path / "demo"
    command = [
        sys.executable, "-m", "megakor", "demo", f"run={folder}", f"corpus={texts}/*.jsonl", "num_steps=10",
        "instruct_steps=3", "pipeline_parallel_size=2", "vocab_size=1400",
        "training=[train.sequence_length=128,logging.wandb=disabled,logging.peak_tflops=0.1]",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["seconds"]["total"] <= MOST_SECONDS
    assert summary["resume_bitwise_equal"] is True
    assert summary["steps_compared"] >= 1
    assert summary["resumed_from_step"] == 5 < summary["killed_at_step"] < 10
    assert summary["export_max_logit_difference"] <= 1e-4
    assert summary["last_loss"] < summary["first_loss"]
    assert summary["corpus_documents"] == 40
    assert summary["vocab_size"] == 1400
    assert json.loads(done.stdout) == summary
    assert str(folder / "report.html") in done.stderr
    assert (folder / "report.html").stat().st_size > 10_000
    samples = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    heldout = (folder / "corpus" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(samples["continuations"]) == min(3, len(heldout))
    assert len(samples["answers"]) == 3


def test_a_foreign_folder_is_refused_and_keeps_its_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="must be new, empty or an earlier demo's folder"):
        Arc(DemoConfig(run=str(tmp_path)), 10, 5).make_folder()
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    own = tmp_path / "own"
    Arc(DemoConfig(run=str(own)), 10, 5).make_folder()
    (own / "old").touch()
    Arc(DemoConfig(run=str(own)), 10, 5).make_folder()
    assert [path.name for path in own.iterdir()] == [MARKER]


def write_metrics(folder: Path, *records: tuple[int, int, float]) -> Path:
    lines = [
        {"kind": "train", "attempt": attempt, "step": step, "loss": loss, "grad_norm": 1.0, "tokens_per_second": 10.0,
         "mfu": 0.5}
        for attempt, step, loss in records
    ]  # fmt: skip
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_resume_is_equal_only_if_every_repeated_step_is(tmp_path: Path) -> None:
    folder = write_metrics(tmp_path, (1, 1, 3.0), (1, 2, 2.0), (1, 3, 1.5), (2, 2, 2.0), (2, 3, 1.5), (2, 4, 1.0))
    figures = resume_figures(folder)
    assert figures == {
        "killed_at_step": 3, "resumed_from_step": 1, "steps_compared": 2, "resume_bitwise_equal": True,
    }  # fmt: skip
    assert training_figures(folder) == {"first_loss": 3.0, "last_loss": 1.0, "tokens_per_second": 10.0, "mfu": 0.5}
    write_metrics(tmp_path, (1, 1, 3.0), (1, 2, 2.0), (2, 2, 2.0000000000000004))
    assert resume_figures(folder)["resume_bitwise_equal"] is False
    write_metrics(tmp_path, (1, 1, 3.0), (2, 2, 2.0))
    assert resume_figures(folder)["resume_bitwise_equal"] is False  # nothing was compared


def test_a_failing_command_is_told_and_so_is_one_that_ends_before_the_kill(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="exit status 3 must be 0"):
        run([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(StageError, match="must run past step 5"):
        run_and_kill([sys.executable, "-c", "pass"], tmp_path, 5)


def test_kill_ends_the_whole_process_group(tmp_path: Path) -> None:
    write_metrics(tmp_path, (1, 9, 1.0))
    script = (
        "import subprocess, sys, pathlib, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    slow_start = [sys.executable, "-c", script]
    (tmp_path / METRICS).rename(tmp_path / "later")

    def appear() -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.02)
        (tmp_path / "later").rename(tmp_path / METRICS)

    threading.Thread(target=appear).start()
    assert run_and_kill(slow_start, tmp_path, 5) == 9
    child = Path("/proc") / (tmp_path / "pid").read_text()
    deadline = time.monotonic() + 10
    while child.exists() and "Z" not in (child / "stat").read_text().split()[2] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.exists() or "Z" in (child / "stat").read_text().split()[2]


def test_override_quotes_lists_of_paths() -> None:
    assert override("corpus", ["/데이터/a b.txt", "it's"]) == "corpus=['/데이터/a b.txt','it\\'s']"
    assert override("run", Path("x/y")) == "run=x/y"
