"""The documentation holds true: commands compose, links resolve, keys and files exist, the site builds and is whole."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from megakor import __version__
from megakor.config.checks import OWNED_DEEPSPEED_KEYS
from megakor.config.compose import field_of
from megakor.config.schema import InstructConfig, PretrainConfig
from megakor.config.verbs import VERBS
from tests.config.commands import ROOT, quickly_composed
from tests.documents import CODE, LINK, anchors, checked, commands, make_targets, prose
from tests.report.browser import CHROMIUM, Browser

PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [*PAGES, ROOT / "README.md", ROOT / "README.ko.md", ROOT / "tokenizer" / "README.md"]
KEY = re.compile(r"(train|parallel|optimizer|schedule|data|checkpoint|evaluation|logging|model|pairs)\.[a-z_]+")
FILES = (".jsonl", ".json", ".safetensors", ".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    ("page", "command"), [pytest.param(page, command) for page in PAGES for command in commands(page)]
)
def test_commands_compose(page: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    checked(command)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_resolve(document: Path) -> None:
    for link in LINK.findall(prose(document)):
        path, _, anchor = link.partition("#")
        assert "://" not in path, f"{name_of(document)}: {link} leaves the project"
        target = (document.parent / path).resolve() if path else document
        assert target.is_file(), f"{name_of(document)}: {link}"
        assert target.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(target), f"{name_of(document)}: {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_and_keys_exist(document: Path) -> None:
    for code in CODE.findall(prose(document)):
        if re.fullmatch(r"(megakor|configs|tokenizer)/[\w./]+", code):
            assert (ROOT / code).exists(), f"{name_of(document)}: {code}"
        key, _, _ = code.partition("=")
        if KEY.fullmatch(key) and not key.endswith(FILES):
            known = field_of(PretrainConfig, key) or field_of(InstructConfig, key)
            assert known, f"{name_of(document)}: {code}"
        if code.startswith("make "):
            assert code.split()[1] in make_targets(), f"{name_of(document)}: {code}"


def test_the_tables_of_keys_are_whole() -> None:
    text = prose(ROOT / "docs" / "configuration.md")
    assert set(OWNED_DEEPSPEED_KEYS) <= set(CODE.findall(text))
    start = prose(ROOT / "docs" / "index.md")
    assert all(f"`{verb}`" in start for verb in VERBS)


def test_the_experiments_are_as_told() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+e9) \| (.+) \|$", prose(ROOT / "docs" / "configuration.md"), re.MULTILINE)
    assert len(rows) == 4
    for name, tokens, rest in rows:
        config = quickly_composed("pretrain", f"experiment={name}")
        train = config.train
        assert train.num_steps == -(-float(tokens) // (train.global_batch_size * train.sequence_length))
        steps, sequences, rate, layout = rest.split(" | ")
        assert steps == f"{train.num_steps:,}"
        assert sequences == f"{train.global_batch_size:,}"
        assert float(rate) == config.optimizer.lr
        parallel = config.parallel
        assert layout == f"{parallel.tensor_parallel_size} × {parallel.pipeline_parallel_size}"


def test_the_figure_shows_every_package() -> None:
    figure = (ROOT / "docs" / "images" / "floors.svg").read_text(encoding="utf-8")
    drawn = set(re.findall(r"<text[^>]*>([\w.]+)</text>", figure))
    packages = {path.parent.name for path in (ROOT / "megakor").glob("*/__init__.py")}
    assert packages <= drawn


def test_the_changelog_knows_this_version() -> None:
    assert f"\n## {__version__}" in (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("mkdocs") is None or find_spec("material") is None:
        pytest.skip("the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_holds_every_page_and_nothing_from_elsewhere(site: Path) -> None:
    for page in PAGES:
        html = (site / f"{page.stem}.html").read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\s\">]+)", html)
        loaded += re.findall(r"<link[^>]*\shref=\"?([^\s\">]+)", html)
        assert loaded
        assert not [address for address in loaded if "//" in address], page.name


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_figure_is_seen(site: Path, tmp_path: Path) -> None:
    with Browser(tmp_path) as browser:
        browser.open(site / "architecture.html", width=1250)
        assert browser.evaluate("document.querySelector('article img').naturalWidth") > 0
        assert not [address for address in browser.requests if not address.startswith(("file:", "data:"))]
        assert not browser.complaints
