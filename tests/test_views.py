"""What a notebook shows of tables: nothing rounded underneath, nothing unescaped, readable on light and dark."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

from finetune.views import Losses, Panel, Scores, Table, number

SCORES = {
    "rows": 240,
    "confidence": 0.95,
    "base": {"loss": 2.0, "accuracy": 0.25, "low": 0.2, "high": 0.31},
    "tuned": {"loss": 1.23456, "accuracy": 0.5, "low": 0.44, "high": 0.56},
    "majority": {"answer": "<Yes>", "accuracy": 0.4, "low": 0.34, "high": 0.46},
    "tests": {
        "tuned_vs_base": {"test": "McNemar", "wins": 70, "losses": 10, "p": 2e-12},
        "tuned_vs_majority": None,
        "loss": {"test": "paired t", "mean": -0.7, "low": -0.8, "high": -0.6, "p": 1e-9},
    },
    "verdict": "The tuned model is better.",
    "forgetting": None,
    "safety": None,
    "gates": [{"gate": "evaluate.min_gain", "limit": 0.1, "value": 0.25, "passed": True}],
}


class Cells(HTMLParser):
    """Collects the texts of cells, and the names of all elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data


def test_what_comes_from_a_file_is_escaped_and_adds_no_element() -> None:
    nasty = '<script>alert(1)</script>&"'
    table = Table(nasty, (nasty, "b"), ((nasty, 1), ("two\nlines", 2)), note=nasty)
    panel = Panel(sentence=nasty, tables=(table,))
    for html in (table._repr_html_(), panel._repr_html_(), Scores(SCORES)._repr_html_()):
        assert set(Cells(html).tags) <= {"div", "p", "table", "caption", "thead", "tbody", "tr", "th", "td", "br"}
    assert Cells(table._repr_html_()).texts[0] == nasty


def test_colours_are_those_of_the_page_around_it() -> None:
    html = Panel(sentence="s", tables=(Table("t", ("a",), ((1,),), note="n"),))._repr_html_()
    named = re.findall(r"(?:^|[;\"])(?:color|background)(?:-color)?:([^;\"]+)", html)
    assert set(named) == {"inherit", "transparent"}
    assert "<style" not in html and "class=" not in html


def test_rows_keep_the_values_that_were_measured_while_the_page_rounds_them() -> None:
    table = Scores(SCORES).table
    assert Scores(SCORES).as_rows()[1] == {"": "tuned", "loss": 1.23456, "right": 0.5, "from": 0.44, "to": 0.56}
    texts = Cells(table._repr_html_()).texts
    assert texts[10:15] == ["tuned", "1.235", "50.0%", "44.0%", "56.0%"]
    assert texts[15:18] == ["always <Yes>", "-", "40.0%"]


def test_scores_say_the_verdict_the_tests_that_were_made_and_the_gates() -> None:
    scores = Scores(SCORES)
    assert scores.verdict in repr(scores) and scores.verdict in scores._repr_html_()
    assert [row["test"] for row in scores.tests.as_rows()] == ["McNemar", "paired t"]
    assert scores.gates.as_rows() == [{"gate": "evaluate.min_gain", "demanded": 0.1, "is": 0.25, "met": True}]
    assert "yes" in repr(scores.gates) and "evaluate.min_gain" not in repr(Scores(SCORES | {"gates": []}))


def shares(refuse: float) -> dict[str, dict[str, float]]:
    return {"refuse": {"value": refuse}, "answer": {"value": 1 - refuse}}


def pair(base: float, tuned: float) -> dict[str, dict[str, float]]:
    return {"base": {"value": base}, "tuned": {"value": tuned}}


LOST = {"base": {"accuracy": 0.5}, "tuned": {"accuracy": 0.475}, "change": -0.025, "low": -0.1, "high": 0.05}
BROKEN = {
    "forgetting": {
        "sets": [{"name": name, "rows": 40, **LOST} for name in ("general_<b>", "general_two")],
        "change": -0.0125, "low": -0.07, "high": 0.04, "verdict": "Forgetting is not shown.",
    },
    "safety": {
        "prompts": 40, "benign": 20, "seeds": [18, 19], "verdict": "No regression is shown.",
        "base": {"harmful": shares(0.8), "benign": shares(0.1)},
        "tuned": {"harmful": shares(0.6), "benign": shares(0.0)},
    },
    "tasks": {
        "sets": [
            {
                "task": "mmlu", "metric": "acc", "rows": 50, **pair(0.4, 0.46), "test": {"p": 0.03},
                "difference": {"mean": 0.06, "low": 0.01, "high": 0.11},
                "slices": [
                    {"name": "law", "rows": 20, **pair(0.35, 0.45), "difference": {"mean": 0.1, "low": 0, "high": 0.2}}
                ],
                "contaminated": {"rows": 50, "clean": {"base": None, "tuned": None}, "hit": pair(0.4, 0.46)},
            },
            {
                "task": "words", "metric": "perplexity", "rows": 9, **pair(12.0, 11.0), "test": None,
                "difference": {"mean": -1.0, "low": None, "high": None}, "slices": [], "contaminated": None,
            },
        ]
    },
}  # fmt: skip


def test_what_was_forgotten_what_drifted_and_what_tasks_say_are_tables_where_they_were_measured() -> None:
    scores = Scores(SCORES | BROKEN)
    assert scores.forgetting is not None and scores.drift is not None and scores.tasks is not None
    lost = scores.forgetting.as_rows()
    assert [row["rows"] for row in lost] == [40, 40, 80] and lost[2]["change"] == -0.0125 and lost[2]["base"] is None
    assert (
        "general_&lt;b&gt;" in scores._repr_html_()
        and "-2.5%" in repr(scores)
        and "Forgetting is not shown." in repr(scores)
    )
    assert scores.drift.as_rows()[1] == {"": "harmful, tuned", "refuse": 0.6, "answer": 0.4}
    assert [row[""] for row in scores.drift.as_rows()][2:] == ["harmless, base", "harmless, tuned"]
    assert "40 harmful and 20 harmless prompts, 3 answers each" in repr(scores)
    took = scores.tasks.as_rows()
    assert [row["task"] for row in took] == [
        "mmlu", "  law", "  rows seen in training, without", "  rows seen in training, alone", "words",
    ]  # fmt: skip
    assert (took[0]["p"], took[0]["change"], took[1]["rows"], took[2]["base"], took[3]["tuned"]) == (
        0.03,
        0.06,
        20,
        None,
        0.46,
    )
    assert took[2]["rows"] == 0 and took[4]["from"] is None
    older = Scores({key: value for key, value in SCORES.items() if key not in BROKEN})
    for plain in (Scores(SCORES), older):
        assert (plain.forgetting, plain.drift, plain.tasks) == (None, None, None)
        assert "forgetting" not in repr(plain) and "benchmarks" not in repr(plain)


def test_a_terminal_gets_aligned_columns_and_long_cells_in_several_lines() -> None:
    table = Table("t", ("name", "value"), (("short", 1234567), ("word " * 20, 0.5)))
    lines = repr(table).splitlines()
    assert lines[0] == "t" and max(map(len, lines)) < 75
    assert lines[2].endswith("1,234,567") and lines[3].endswith("      0.5")
    assert len(lines) == 5 and lines[4].startswith("word")


def test_losses_show_their_plot_as_it_lies_on_disk(tmp_path: Path) -> None:
    plot = tmp_path / "loss.png"
    plot.write_bytes(b"\x89PNG...")
    losses = Losses(({"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5}), plot)
    assert losses.values == [2.5, 1.5] and losses.as_rows()[1] == {"step": 2, "loss": 1.5}
    found = re.search(r"base64,([^\"]+)", losses._repr_html_())
    assert found and base64.b64decode(found[1]) == b"\x89PNG..."
    assert "<img" not in Losses(losses.steps, None)._repr_html_()
    assert "2.500" in repr(losses) and "last of 2" in repr(losses)
    assert repr(Losses((), None)) == "no updates"


def test_numbers_are_written_as_a_person_reads_them() -> None:
    told = [number(value) for value in (1234567, 123.4, 1.234, 0.00001, 2e15, -0.0265, 0)]
    assert told == ["1,234,567", "123", "1.23", "1e-05", "2e+15", "-0.0265", "0"]
