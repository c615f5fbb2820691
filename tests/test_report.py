from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import finetune.report as room
from finetune import evaluate
from finetune.compose import recipe_yaml
from finetune.recipe import Evaluate, Model, Recipe
from finetune.report import plots
from finetune.rundir import RunDir, write_json, write_text

NASTY = "<script>alert('x')</script> & \"quotes\" {{ recipe.name }} $a_1$"
GIB = 2**30


def scores(choices: list[str]) -> dict[str, Any]:
    """Scores of twelve rows with figures that do not repeat."""
    rows = [{"row": str(i), "group": f"g{i // 2}", "answer": "ab"[i % 2], "choices": choices} for i in range(12)]
    base, tuned = (
        [
            SimpleNamespace(
                loss=loss + i / 37,
                logprobs=np.full(2 + i % 3, -loss - i / 37, dtype=np.float32),
                choice=("ab"[(i + (i % 4 == 0) * wrong) % 2]) if choices else None,
                tied=i == 5,
            )
            for i in range(12)
        ]
        for loss, wrong in ((2.7, 1), (0.31 + 1 / 7, 0))
    )
    train = {"answer": ["a"] * 3, "choices": [choices] * 3, "group": ["g0"] * 3}
    made = evaluate.conclude(rows, base, tuned, train, Evaluate(min_gain=0.123))  # type: ignore[arg-type]
    samples = [{"row": "7", "question": NASTY, "expected": "a" + NASTY, "base": "b" + NASTY, "tuned": "c" + NASTY}]
    return made | {"adapter_effect": {"largest_nats": 1.25, "mean_nats": 0.0625}, "samples": samples}


def coverage(routed_4bit: int = 800) -> list[dict[str, Any]]:
    rest = 800 - routed_4bit
    return [
        {"group": "embedding", "parameters": 100, "bytes": 200, "parameters_4bit": 0, "adapted": 0, "trainable": 0},
        {"group": "attention", "parameters": 100, "bytes": 57, "parameters_4bit": 100, "adapted": 100, "trainable": 9},
        {"group": "dense", "parameters": 0, "bytes": 0, "parameters_4bit": 0, "adapted": 0, "trainable": 0},
        {
            "group": "routed",
            "parameters": 800,
            "bytes": int(routed_4bit * 4.5 / 8) + 2 * rest,
            "parameters_4bit": routed_4bit,
            "adapted": 800,
            "trainable": 64,
        },
    ]


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A run in which every stage has finished."""
    run = RunDir(tmp_path / "it's a run")
    run.path.mkdir()
    model = Model(title="Base " + NASTY, licence="apache-2.0", licence_url="https://example.org/licence")
    write_text(run.recipe, recipe_yaml(Recipe(name="toy", purpose="Purpose " + NASTY, model=model)))
    steps = [{"step": i + 1, "loss": 3 - i / 20, "lr": 1e-4, "grad_norm": 1.5, "seconds": 0.25} for i in range(40)]
    write_json(
        run.train,
        {
            "steps": steps, "rows": 3, "passes": 1.5, "tokens": 12345, "trainable_tokens": 678, "seconds": 91.5,
            "peak_memory_gib": 2.345, "load_peak_gib": 1.234, "load_seconds": 3.5, "resident_gib": 0.567,
            "coverage": coverage(), "experts_without_update": {}, "expert_rows_with_a_gradient": {},
            "versions": {"torch": "2.13.0", "peft": "0.21.2"},
            "seed": 17, "device": "cpu",
        },
    )  # fmt: skip
    write_json(run.scores, scores(["a", "b"]))
    parts = [("expert stacks, 4-bit", 0.25), ("reserve", 1.5), ("memory", 1.75)]
    write_json(
        run.plan,
        {"memory": [{"name": n, "value": v, "unit": "GiB", "basis": "computed", "how": "how " + n} for n, v in parts]},
    )
    source = {
        "kind": "package", "files": {}, "licence": "CC-BY-4.0", "licence_source": "its page", "title": "Texts",
        "attribution": "Someone " + NASTY, "note": "A note.",
    }  # fmt: skip
    split = {
        "rows": 3,
        "groups": 2,
        "classes": {},
        "tokens": 99,
        "trainable_tokens": 9,
        "median_length": 30,
        "longest": 41,
    }
    write_text(run.data / "mask.txt", "⟦yes⟧ " + NASTY)
    lines = [("train", ""), ("train", ""), ("heldout", ""), ("", "duplicate")]
    write_text(
        run.data / "ledger.jsonl", "".join(json.dumps({"split": s, "code": c, "why": ""}) + "\n" for s, c in lines)
    )
    write_json(
        run.data / "report.json", {"source": source, "rows_read": 4, "splits": {"train": split, "heldout": split}}
    )
    run.merged.mkdir()
    write_text(run.export / "hf" / "config.json", "{}")
    kl = {"mean_kl": 0.0001, "max_kl": 0.002, "effect_kl": 1.5, "top1_agreement": 1.0}
    write_json(
        run.export / "parity.json",
        kl | {"prompts": 8, "tokens": 33, "precision": "fp32", "same_answers": 7, "answers": 8},
    )
    return run


def written(run_dir: RunDir) -> str:
    room.report(run_dir)
    return run_dir.report.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.style = tag == "style"

    def handle_data(self, data: str) -> None:
        if not self.style:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_what_users_and_models_wrote_is_shown_and_never_run(run_dir: RunDir) -> None:
    text = written(run_dir)
    page = Page(text)
    assert "<script" not in text
    assert {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object", "base", "form"} == set()
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    for place in ("Purpose ", "Base ", "a", "b", "c", "⟦yes⟧ ", "Attribution: Someone "):
        assert place + NASTY in page.text, place


def test_the_page_loads_nothing(run_dir: RunDir) -> None:
    text = written(run_dir)
    page = Page(text)
    loads = [
        v for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "href", "xlink:href", "data")
    ]
    assert loads and all(v and v.startswith("#") for v in loads)  # the plots refer to their own parts
    assert not re.search(r"@import|url\((?!#)", text)
    assert (
        "meta",
        {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"},
    ) in page.tags


def leaves(value: Any, name: str = "") -> list[tuple[str, str]]:
    """(path, figure as the file writes it) of every number in a JSON value."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        step = (lambda k: f"[{k}]") if isinstance(value, list) else (lambda k: f".{k}" if name else k)
        return [leaf for key, part in pairs for leaf in leaves(part, name + step(key))]
    return [(name, json.dumps(value))] if isinstance(value, int | float) else []


def test_every_number_of_the_scores_is_on_the_page(run_dir: RunDir) -> None:
    words = Page(written(run_dir)).text
    missing = [
        f"{name} {text}"
        for name, text in leaves(json.loads(run_dir.scores.read_text()))
        if f"{name} {text}" not in words
    ]
    assert missing == []
    found = [m[0] for m in re.finditer(r"(?<=[ :\[])-?\d[\d.e+-]*(?=[,\s\]}])", run_dir.scores.read_text())]
    assert len(found) > 60
    assert [n for n in found if not re.search(rf"(?<![\d.]){re.escape(n)}(?![\d.])", words)] == []


def test_the_head_of_the_page_says_who_is_better(run_dir: RunDir) -> None:
    text = written(run_dir)
    told = json.loads(run_dir.scores.read_text())
    words = Page(text).text
    assert told["verdict"] in words
    assert f"{told['tuned']['correct']} of 12 right" in words and "75.0 %" in words and "100.0 %" in words
    assert 'class="verdict"' in text  # three rows of twelve show no gain, and the page does not colour it as one
    told["gain"] = True
    write_json(run_dir.scores, told)
    assert 'class="verdict gain"' in written(run_dir)


def test_without_choices_there_is_a_loss_table_and_no_accuracy(run_dir: RunDir) -> None:
    write_json(run_dir.scores, scores([]))
    text = written(run_dir)
    assert "may be format alone" in text and "tile tuned" not in text and text.count("<svg ") == 1
    assert "Gate evaluate.min_gain: not passed" in text


def test_the_coverage_table_says_plainly_what_is_in_4_bits(run_dir: RunDir) -> None:
    words = Page(written(run_dir)).text
    assert (
        "90.0 % of the base is really in 4 bits: attention, routed experts. Not in 4 bits: embeddings and head."
        in words
    )
    assert "dense MLPs" not in words
    rows = {row["name"]: row for row in room.coverage_rows(coverage(routed_4bit=0))}
    assert rows["routed experts"]["stored"] == "16-bit" and rows["attention"]["stored"] == "4-bit"
    assert room.storage_sentence(list(rows.values())) == (
        "10.0 % of the base is really in 4 bits: attention. Not in 4 bits: embeddings and head, routed experts."
    )
    rows = {row["name"]: row for row in room.coverage_rows(coverage(routed_4bit=400))}
    assert rows["routed experts"]["stored"] == "50.0 % 4-bit, rest 16-bit"
    assert room.storage_sentence(list(rows.values())) == (
        "50.0 % of the base is really in 4 bits: attention. Partly: routed experts. Not in 4 bits: embeddings and head."
    )
    assert room.storage_sentence(room.coverage_rows(coverage()[:1])) == "No weight of the base is in 4 bits."


def test_the_page_has_memory_rows_licences_versions_and_commands(run_dir: RunDir) -> None:
    words = Page(written(run_dir)).text
    for part in (
        "weights at rest 0.25 0.567 GiB -55.9 %", "peak while training 1.75 2.35 GiB -25.4 %",
        "measured, highest while training 2.35", "planned, sum 1.75", "planned, expert stacks, 4-bit 0.25",
        "train 2 dropped: duplicate 1 heldout 1", "Apache License 2.0", "CC-BY-4.0", "torch 2.13.0, peft 0.21.2",
        "hf/config.json 2 B", "same answer to 7 of 8 prompts",
        f"python -m finetune chat run='{run_dir.path.parent}/it'\"'\"'s a run'",
    ):  # fmt: skip
        assert part in words, part
    assert "Not finished yet" not in words


def test_an_unfinished_run_gets_a_page_that_says_what_is_missing(run_dir: RunDir) -> None:
    run_dir.scores.unlink()
    run_dir.train.unlink()
    words = Page(written(run_dir)).text
    assert "Not finished yet: train, evaluate. To go on: python -m finetune train run=" in words


def test_plots_are_xml_in_the_colours_of_the_page_and_keep_only_the_ids_they_use() -> None:
    one = plots.intervals([("tuned", 0.7, 0.6, 0.8), ("base", 0.4, 0.3, 0.5)], 0.95)
    two = plots.loss_curve([1, 2, 3], [3.0, 2.0, 1.0])
    for svg in (one, two):
        ElementTree.fromstring(svg)
        assert "var(--accent)" in svg and not re.search(r"#0[1-4]0[1-4]0[1-4]", svg) and "<metadata" not in svg
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set()
        ids = set(re.findall(r'\bid="([^"]+)"', svg))
        assert ids and set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg)) == ids
    assert one == plots.intervals([("tuned", 0.7, 0.6, 0.8), ("base", 0.4, 0.3, 0.5)], 0.95)


def test_the_dot_of_a_share_stands_where_the_axis_says() -> None:
    from unittest.mock import patch

    seen: list[Any] = []
    with patch.object(plots, "_svg", lambda figure, axes, title: seen.append(axes) or ""):
        plots.intervals([("tuned", 0.7, 0.6, 0.8), ("base", 0.4, 0.3, 0.5)], 0.95)
    lines = [(list(map(float, line.get_xdata())), list(line.get_ydata())) for line in seen[0].lines]
    assert [label.get_text() for label in seen[0].get_yticklabels()] == ["base", "tuned"]
    assert lines == [([30.0, 50.0], [0, 0]), ([40.0], [0]), ([60.0, 80.0], [1, 1]), ([70.0], [1])]


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "\u2013"), (0, "0"), (12345, "12\u202f345"), (12345.6, "12\u202f346"), (0.012345, "0.0123")],
)
def test_numbers_are_written_for_reading(value: float | None, words: str) -> None:
    assert room.number(value) == words
