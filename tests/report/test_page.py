"""The page as a file: whole, self-contained, and safe whatever stands in a run's files."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megakor.config.compose import main
from megakor.report.__main__ import run
from megakor.report.page import write_report
from tests.report.conftest import write_config, write_json


class Page(HTMLParser):
    """The elements of a page, its addresses, its text outside scripts and styles, and its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text, self.styles = "", ""
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.inside = tag
        for name, value in attributes:
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in ("src", "srcset", "href", "action", "data", "poster", "background", "xlink:href"):
                self.addresses.append(value or "")
            if name == "style":
                self.styles += value or ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside == "style":
            self.styles += data
        else:
            self.text += data


def test_the_page_loads_nothing(demo: Path) -> None:
    page = Page(write_report(demo))
    assert [address for address in page.addresses if not address.startswith("#")] == ["data:,"]
    assert not re.search(r"url\(|@import", page.styles)
    assert len(page.scripts) == 3
    assert page.scripts[1].lstrip().startswith("/**\n* plotly.js")
    assert not {"iframe", "object", "embed", "img", "base"} & set(page.tags)
    source = (demo / "report.html").read_text()
    assert "default-src 'none'" in source
    assert "connect-src" not in source


def test_a_demo_shows_the_whole_arc(demo: Path) -> None:
    text = Page(write_report(demo)).text
    for word in (
        "Sources", "encyclopedia.jsonl", "Shards", "vocabulary", "1,200", "bytes per token", "BPE", "One sentence in",
        "Pretraining", "Instruction tuning", "Starts", "Checkpoints", "removed since", "바다는", "넓고 깊다.",
        "햇빛 이야기", "빛이 흩어지기 때문입니다.", "3 min 10 s", "unigram bits per byte", "0.864 × unigram",
        "hidden_size: 192", "Environment", "sentencepiece",
    ):  # fmt: skip
        assert word in text, word


def test_a_run_with_nothing_but_metrics_has_a_page(bare_run: Path) -> None:
    text = Page(write_report(bare_run)).text
    assert "Loss" in text
    assert "Bits per byte" in text
    for word in ("Corpus", "Tokenizer", "Samples", "resolved configuration", "Time and figures", "Starts", "None"):
        assert word not in text, word


def test_what_stands_in_files_is_text_and_never_markup(demo: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=//x.example onerror=alert(2)>"
    clean = Page(write_report(demo))
    write_config(demo / "pretrain", evil, model={"note": evil})
    write_json(demo / "samples.json", {"continuations": [{"prompt": evil, "text": evil}]})
    write_json(demo / "summary.json", {"seconds": {evil: 1.0}, evil: 2.0})
    metrics = demo / "pretrain" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"heldout"', json.dumps(evil)))
    corpus = demo / "corpus" / "corpus.json"
    corpus.write_text(corpus.read_text().replace('"encyclopedia.jsonl"', json.dumps(evil)))
    page = Page(write_report(demo))
    assert page.text.count(evil) >= 7
    assert page.tags.count("script") == clean.tags.count("script")
    assert "img" not in page.tags
    assert evil in json.dumps(json.loads(page.scripts[0]))


def test_numbers_that_are_not_finite_do_not_stop_the_page(bare_run: Path) -> None:
    metrics = bare_run / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    record = {**json.loads(lines[-1]), "step": 13, "loss": float("nan"), "grad_norm": float("inf")}
    metrics.write_text("\n".join([*lines, json.dumps(record)]))
    page = Page(write_report(bare_run))
    assert "nan" in page.text
    json.loads(page.scripts[0], parse_constant=lambda name: (_ for _ in ()).throw(AssertionError(name)))


def test_the_verb_writes_the_page_or_one_line(
    bare_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["megakor"])
    page = tmp_path / "보고서" / "page.html"
    main("report", run, [f"run={bare_run}", f"out={page}"])
    assert page.is_file()
    (bare_run / "metrics.jsonl").write_text("")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main("report", run, [f"run={bare_run}"])
    assert stopped.value.code == 1
    assert not (bare_run / "report.html").exists()
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "at least one training step" in told
