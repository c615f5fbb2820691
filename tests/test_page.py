"""A person sees which tokens are trained, on the terminal and as a page, and what became of the rows."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from finetune.__main__ import main
from finetune.data.output import dataset
from finetune.data.page import show_report, show_rows, write_page
from finetune.data.store import decoder
from tests.test_data import jsonl, qa
from tests.test_shape import prepare

ROWS = [qa(f"question {i} <b>&", f"answer {i} with ä and 🙂") for i in range(12)]


@pytest.fixture
def folder(tmp_path: Path, base: Path) -> Path:
    return prepare(tmp_path, base, jsonl(tmp_path / "rows.jsonl", *ROWS), privacy="report")


class Marks(HTMLParser):
    """The text of a page inside and outside <mark>."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.depth, self.texts = False, 0, {True: "", False: ""}

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.depth += tag == "pre"
        self.inside = self.inside or tag == "mark"

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag == "pre"
        self.inside = self.inside and tag != "mark"

    def handle_data(self, data: str) -> None:
        if self.depth:
            self.texts[self.inside] += data


def test_the_page_marks_exactly_the_trained_text(tmp_path: Path, base: Path, folder: Path) -> None:
    rows = [dataset(folder / "train.arrow")[i] for i in range(2)]
    write_page(rows, decoder(base), "rows <1>", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Marks()
    page.feed(text)
    assert page.texts[True] == "".join(f"{row['answer']}<|im_end|>\n" for row in rows)
    assert all(row["messages"][0]["content"] in page.texts[False] for row in rows)
    assert "<title>rows &lt;1&gt;</title>" in text
    assert not re.search(r"https?://|<script|<b>", text)


def test_the_terminal_shows_the_same(base: Path, folder: Path) -> None:
    rows = [dataset(folder / "train.arrow")[0]]
    plain, colour = io.StringIO(), io.StringIO()
    show_rows(rows, decoder(base), Console(file=plain, width=200))
    assert f"⟦{rows[0]['answer']}<|im_end|>" in plain.getvalue()
    show_rows(rows, decoder(base), Console(file=colour, force_terminal=True, color_system="standard", width=200))
    assert f"\x1b[1;32m{rows[0]['answer']}<|im_end|>" in colour.getvalue()
    assert "⟦" not in colour.getvalue()


def test_the_report_says_what_came_in_and_what_was_not_looked_for(folder: Path) -> None:
    out = io.StringIO()
    show_report(json.loads((folder / "report.json").read_text()), Console(file=out, width=200))
    text = out.getvalue()
    assert "12 rows read" in text
    assert re.search(r"kept: train\s+│\s+11", text)
    assert "not detected: personal data: names" in text


def test_an_index_is_made_from_a_file_and_its_words_are_not_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "which of these seven planets has the largest moon that anybody has ever seen"
    jsonl(tmp_path / "exam.jsonl", {"id": "one", "question": words, "answer": "Jupiter"})
    assert main(["data", "index", "file=exam.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "exam.index: 1 items of exam.jsonl" in out
    assert "not detected: " in out
    assert b"planets" not in (tmp_path / "exam.index").read_bytes()
    assert main(["data", "index", "fil=exam.jsonl"]) == 2
    assert (
        "CFG-012 data index: fil is not known here. Type: python -m finetune data index file="
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_preview_and_explain_work_as_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    jsonl(tmp_path / "my.jsonl", *(qa(f"question {i}", f"answer {i}") for i in range(20)))
    words = ["recipe=qwen3_30b_legal", "scale=rehearsal", "data.train_files=[my.jsonl]"]
    assert main(["data", "explain", *words]) == 0
    assert "not prepared yet" in capsys.readouterr().out
    assert main(["data", "preview", *words, "--rows", "2"]) == 0
    out = capsys.readouterr()
    assert out.out.count("⟦answer ") == 2
    assert "your train_files take the place of the card legal_licences" in out.err
    assert (tmp_path / "data_preview.html").is_file()
    assert not (tmp_path / "runs").exists()
    assert main(["data", "explain", *words]) == 0
    assert "prepared before" in capsys.readouterr().out
    assert main(["data", "preview", *words, "--rows", "none"]) == 2


@pytest.mark.data
def test_an_index_is_made_from_an_evaluation_card_and_finds_its_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.data.benchmarks import items_of_card
    from finetune.data.contamination import load
    from finetune.recipe import Recipe

    monkeypatch.chdir(tmp_path)
    assert main(["data", "index", "card=general_openbookqa", "network=true"]) == 0
    assert "general_openbookqa.index: 500 items of general_openbookqa" in capsys.readouterr().out
    index, items = load(tmp_path / "general_openbookqa.index"), items_of_card("general_openbookqa", Recipe())
    assert len(items) == 500
    found = [any(hit.item == item.id for hit in index.hits(f"Please answer: {item.text}")) for item in items]
    assert sum(found) >= 475  # the others are shorter than what is looked for, or nearly equal to an earlier one
    assert main(["data", "index", "card=legal_licences"]) == 2
