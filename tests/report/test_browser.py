"""The page in a headless Chromium with the network off: plots drawn, nothing asked for, no complaint, no overflow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megakor.report.page import write_report
from tests.report.browser import CHROMIUM, Browser

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")

DRAWN = """Array.from(document.querySelectorAll('.plot'), (plot) => {
  const box = plot.querySelector('.main-svg')?.getBoundingClientRect();
  return {
    id: plot.id, width: box?.width, room: plot.clientWidth,
    curves: Array.from(plot.querySelectorAll('.scatterlayer .trace'), (trace) =>
      trace.querySelectorAll('path.js-line[d], .points path').length),
  };
})"""
CURVE = "getComputedStyle(document.querySelector('#pretrain-loss path.js-line')).stroke"
PAGE = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def page(demo_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(demo_once, tmp_path_factory.mktemp("page") / "보고서.html")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as started:
        yield started


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page_draws_every_plot_and_asks_for_nothing(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width, dark)
    plots = browser.evaluate(DRAWN)
    names = ("loss", "bits", "lr", "norm", "speed", "mfu")
    assert [plot["id"] for plot in plots] == [f"{run}-{name}" for run in ("pretrain", "instruct") for name in names]
    for plot in plots:
        assert min(plot["curves"], default=0) > 0, plot
        assert 200 < plot["width"] <= plot["room"], plot
    assert [len(plot["curves"]) for plot in plots[:2]] == [3, 4]
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.requests == [page.resolve().as_uri()]
    assert browser.complaints == []


def test_page_and_curves_follow_the_theme(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    light = browser.evaluate(CURVE), browser.evaluate(PAGE)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 100)))")
    dark = browser.evaluate(CURVE), browser.evaluate(PAGE)
    assert light == ("rgb(39, 100, 181)", "rgb(252, 252, 251)")
    assert dark == ("rgb(116, 169, 238)", "rgb(21, 23, 26)")
    assert browser.complaints == []


def test_the_browser_would_tell(browser: Browser, tmp_path: Path) -> None:
    """The checks above can fail: a page that loads and complains is seen to."""
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://x.example/a.png'><script>console.error('seen'); missing();</script>")
    browser.open(page, 800)
    assert "http://x.example/a.png" in browser.requests
    told = " ".join(browser.complaints)
    assert "seen" in told
    assert "missing is not defined" in told
