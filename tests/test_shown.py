"""The report and the comparison as headless Chromium shows them: on a phone, in the dark, on paper, offline."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from finetune.evaluate.rows import write_lines
from finetune.pairwise import against_first
from finetune.report.comparison import compare_runs
from finetune.report.gather import gather
from finetune.report.render import page
from tests.browser import CHROMIUM, Tab, chromium
from tests.finished_run import finished, results, with_everything

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
SIZES = [(width, scheme) for width in (360, 768, 1280) for scheme in ("light", "dark")]
LARGE, SMALL = 3.0, 4.5
"""WCAG 2.2, 1.4.3 (AA): contrast of text from 24 px, or 18.66 px in bold, and of smaller text."""

# Every element with words of its own, with the colours it is drawn in; SVG text is filled. The background is the first
# one up the tree that is not see-through; closed details have no boxes and are opened first.
COLOURS = """
(() => {
  const shown = [];
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || !e.getClientRects().length) continue;
    if (e.tagName === "title") continue;
    const style = getComputedStyle(e);
    let behind = e, colour = "";
    while (behind && !colour) {
      const c = getComputedStyle(behind).backgroundColor;
      if (!/, 0\\)$/.test(c) && c !== "transparent") colour = c;
      behind = behind.parentElement;
    }
    const svg = e.namespaceURI.endsWith("svg");
    const px = parseFloat(style.fontSize) * (svg ? Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b) : 1);
    shown.push({words: e.textContent.trim().slice(0, 40), ink: svg ? style.fill : style.color, paper: colour,
                px: px, bold: parseInt(style.fontWeight) >= 700, tag: e.tagName});
  }
  return shown;
})()
"""
WIDER = """
(() => {
  const width = document.documentElement.clientWidth;
  const clipped = e => { for (let p = e.parentElement; p; p = p.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(p).overflowX)) return true; return false; };
  return [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > width + 1 && !clipped(e)
    && !e.closest("svg")).map(e => e.tagName + "." + e.className);
})()
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of a run with everything, of one that has only begun, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    whole = with_everything(finished(folder / "whole"), layers=48, experts=128)
    plain = finished(folder / "plain")
    begun = finished(folder / "begun")
    begun.scores.unlink()
    begun.train.unlink()
    other = finished(folder / "other")
    write_lines(other.scores_rows, results(wrong=8))
    runs = [whole, plain, other]
    compared = compare_runs(runs, against_first(runs))
    made = {"report": page(gather(whole)), "begun": page(gather(begun)), "comparison": compared}
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def channels(colour: str) -> tuple[float, float, float]:
    """Red, green and blue of a computed colour, 0 to 1. It must not be see-through."""
    values = [float(part) for part in re.findall(r"[\d.]+", colour)]
    assert colour.startswith("rgb") and (len(values) == 3 or values[3] == 1), colour
    return values[0] / 255, values[1] / 255, values[2] / 255


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours as WCAG 2.2 defines it."""

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def faint(shown: list[dict[str, Any]]) -> list[str]:
    """Words whose contrast is below what their size asks for."""
    found = []
    for part in shown:
        large = part["px"] >= 24 or (part["px"] >= 18.66 and part["bold"])
        ratio = contrast(part["ink"], part["paper"])
        if ratio < (LARGE if large else SMALL):
            found.append(f"{ratio:.2f} {part['tag']} {part['words']} {part['ink']} on {part['paper']}")
    return found


def test_contrast_is_reckoned_as_the_standard_does() -> None:
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.005)  # W3C's own example
    part = {
        "px": 16,
        "bold": False,
        "tag": "P",
        "words": "x",
        "ink": "rgb(119, 119, 119)",
        "paper": "rgb(255, 255, 255)",
    }
    assert faint([part]) and not faint([part | {"px": 24}]) and not faint([part | {"px": 19, "bold": True}])


@pytest.mark.parametrize("name", ["report", "begun", "comparison"])
def test_a_page_fits_every_screen_in_both_schemes_and_says_nothing_to_anybody(
    pages: dict[str, Path], tab: Tab, name: str
) -> None:
    tab.open(pages[name])
    for width, scheme in SIZES:
        tab.look(width, scheme)
        assert tab.value("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
        tab.value("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert tab.value("document.documentElement.scrollWidth") == width
        assert tab.value(WIDER) == []
        shown = tab.value(COLOURS)
        assert len(shown) > 60
        assert faint(shown) == []
        assert min(part["px"] for part in shown) >= (7.9 if width == 360 else 10)
        dark = tab.value("getComputedStyle(document.body).backgroundColor")
        assert (contrast(dark, "rgb(0, 0, 0)") < 2) == (scheme == "dark")
    assert tab.complaints() == []
    assert [url for url in tab.requests() if not url.startswith("data:image/png;base64,")] == [pages[name].as_uri()]


def test_the_first_screen_has_all_four_answers(pages: dict[str, Path], tab: Tab) -> None:
    tab.open(pages["report"])
    tab.look(1280, height=900)
    ends = tab.value("[...document.querySelectorAll('.answer')].map(e => e.getBoundingClientRect().bottom)")
    assert len(ends) == 4 and max(ends) <= 900
    tab.look(360, height=640)
    assert tab.value("document.querySelector('.answer .short').getBoundingClientRect().bottom") < 640


def test_tables_can_be_scrolled_with_the_keyboard_and_have_captions_and_headings_in_order(
    pages: dict[str, Path], tab: Tab
) -> None:
    for name in ("report", "comparison"):
        tab.open(pages[name])
        tab.look(360)
        assert tab.value("[...document.querySelectorAll('.wide')].filter(e => e.tabIndex !== 0).length") == 0
        assert tab.value("[...document.querySelectorAll('.wide table')].filter(t => !t.caption).length") == 0
        assert tab.value("[...document.querySelectorAll('svg')].filter(e => !e.getAttribute('aria-label')).length") == 0
        levels = tab.value("[...document.querySelectorAll('h1, h2, h3')].map(e => Number(e.tagName[1]))")
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        marks = "[...document.querySelectorAll('main, header, footer')].map(e => e.tagName).sort().join()"
        assert tab.value(marks) == "FOOTER,HEADER,MAIN"


def test_on_paper_all_details_are_open_dark_readers_get_black_on_white_and_nothing_is_cut(
    pages: dict[str, Path], tab: Tab
) -> None:
    tab.open(pages["report"])
    tab.look(700, "dark", media="print")
    inside = "[...document.querySelectorAll('details')].map(d => [d.open, d.lastElementChild.checkVisibility()])"
    assert [opened for opened, _ in tab.value(inside)] == [False] * len(tab.value(inside))
    assert len(tab.value(inside)) > 4 and all(seen for _, seen in tab.value(inside))
    tab.look(700, "dark")
    assert not any(seen for _, seen in tab.value(inside))  # on a screen they are closed
    tab.look(700, "dark", media="print")
    assert tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.value("document.documentElement.scrollWidth") == 700 and tab.value(WIDER) == []
    tab.look(1280, "dark")
    pdf = tab.pdf()
    assert pdf.startswith(b"%PDF-") and len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 3


def test_a_page_that_overflows_asks_for_something_or_is_faint_is_found_out(tmp_path: Path, tab: Tab) -> None:
    wrong = tmp_path / "wrong.html"
    wrong.write_text(
        "<!doctype html><body style='background: #fff'><p style='width: 900px; color: #999'>faint</p>"
        "<img src='http://example.org/x.png' alt=''><script>console.error('x')</script></body>"
    )
    tab.open(wrong)
    tab.look(360)
    assert tab.value("document.documentElement.scrollWidth") > 360 and "P." in tab.value(WIDER)
    assert faint(tab.value(COLOURS)) and tab.complaints()
    assert "http://example.org/x.png" in tab.requests()
