from __future__ import annotations

import logging
import re

import pytest

from megakor import logs


@pytest.fixture(autouse=True)
def fresh_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger("megakor")
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    root.manager._clear_cache()  # levels are cached per logger


def test_rank_0_informs_and_others_only_warn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    log = logs.get_logger("megakor.some.module")
    log.info("hidden")
    log.warning("gap %d", 3)
    assert re.fullmatch(r"\d\d:\d\d:\d\d rank 1: warning: gap 3\n", capsys.readouterr().err)
    assert list(logs.progress(range(3), description="hidden")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_foreign_names_go_under_megakor(capsys: pytest.CaptureFixture[str]) -> None:
    assert logs.get_logger("__main__").name == "megakor.__main__"
    logs.get_logger("__main__").info("said once")
    assert capsys.readouterr().err.count("said once") == 1


def test_progress_without_a_terminal_is_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "PLAIN_INTERVAL", 0.0)
    assert list(logs.progress([1, 2], unit="files", description="reading")) == [1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert re.search(r" reading: 1 of 2 files \(50%\) in \d\.\d s, \d s left$", lines[0])
    assert re.search(r" reading: 2 of 2 files \(100%\) in \d\.\d s$", lines[-1])
    with logs.progress(total=2_000_000, unit="B") as bar:
        bar.update(1_000_000)
    assert "1.00M of 2.00M B (50%)" in capsys.readouterr().err


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for number in logs.progress(range(2), description="reading"):
        logs.get_logger("megakor").info("at %d", number)
    written = capsys.readouterr().err
    assert "\rreading: 100%" in written
    assert " at 1\n" in written
