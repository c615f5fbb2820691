"""The page of a run: what it says, from which file, and that nothing it was given runs, loads or is lost."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import patch
from xml.etree import ElementTree

import pytest

import finetune.report as room
from finetune.errors import RunError
from finetune.recipe import Recipe
from finetune.report import plots, reading, tables
from finetune.report.answers import better, cost, cost_notes, drift, licence
from finetune.report.gather import gather, left_by, stage_seconds
from finetune.report.render import page
from finetune.rundir import RunDir, read_json, write_json
from tests.finished_run import NASTY, coverage, finished, scores, with_everything

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return finished(tmp_path / "it's a run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with everything that a page can show, and its page; tests only read it."""
    run = with_everything(finished(tmp_path_factory.mktemp("runs") / "it's a run"))
    room.report(run)
    return run


def written(run_dir: RunDir) -> str:
    return page(gather(run_dir))


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


def card(text: str, number: int) -> str:
    """The visible text of one of the four answers, 1 to 4."""
    return Page(re.findall(r'<section class="answer.*?</section>', text, re.DOTALL)[number - 1]).text


def test_what_users_and_models_wrote_is_shown_and_never_run(whole: RunDir) -> None:
    text = whole.report.read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text
    assert {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object", "base", "form"} == set()
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    places = (
        "Purpose ", "Base ", "a", "b", "c", "⟦yes⟧ ", "Attribution: Someone ", "mmlu ", "exact_match ", "McNemar ",
        "subject ", "exam ", "lm-evaluation-harness 0.4.13 ", "general ", "of version 3 ", "Prompt ", "No ", "Well ",
        "refuse ", "answer ", "length ", "short ", "max_forgetting ", "it refuses less ", "row-9 ", "not here ",
        "TRN-005 ", "how ", "hf ",
    )  # fmt: skip
    for place in places:
        assert place + NASTY in page.text, place
    assert "base/weights <img src=x onerror=alert(1)>" in page.text


def test_the_page_loads_nothing(whole: RunDir) -> None:
    text = whole.report.read_text(encoding="utf-8")
    page = Page(text)
    loads = [
        v for _, attributes in page.tags for k, v in attributes.items() if k in ("src", "href", "xlink:href", "data")
    ]
    assert any(v and v.startswith("data:image/png;base64,") for v in loads)  # the heat map's pixels
    assert all(v and v.startswith(("#", "data:image/png;base64,")) for v in loads)
    assert not re.search(r"@import|url\((?!#)", text)
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}) in page.tags


def test_links_on_the_page_lead_somewhere_and_no_id_stands_twice(whole: RunDir) -> None:
    page = Page(whole.report.read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 10
    named = {a[key] for _, a in page.tags for key in ("href", "xlink:href") if key in a and a[key].startswith("#")}
    labels = {f"#{a['aria-labelledby']}" for _, a in page.tags if "aria-labelledby" in a}
    assert labels | named <= {f"#{name}" for name in ids}


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


def test_the_first_screen_answers_four_questions(whole: RunDir) -> None:
    text = whole.report.read_text(encoding="utf-8")
    told = read_json(whole.scores)
    first = card(text, 1)
    assert first.startswith("Did it get better? ✗ No gain shown; a gate is not passed")
    for part in (
        told["verdict"],
        "right answers 75.0 % (46.8 to 91.1) 100.0 % (75.8 to 100.0)",
        "Not passed: evaluate.max_refusal_drop.",
        "General questions: \u22122.1 points (\u22123.9 to \u22120.3) against base.",
        "Regression against base: refuses harmful prompts 81.0 % to 62.0 % (p = 1e\u221209).",
    ):  # fmt: skip
        assert part in first, part
    assert "What did it cost? 91.5 s" in card(text, 2)
    for part in (
        "training 112 s 91.5 s",
        "energy 0.0217 kWh \u2013",
        "money 0.0775 USD \u2013",
        "all stages took 3.45 min",
    ):
        assert part in card(text, 2), part
    assert "May I use it? ✓ Yes, with 1 duty" in card(text, 3) and "base Apache License 2.0 yes" in card(text, 3)
    assert "rows CC-BY-4.0" in card(text, 3) and "Information, not legal advice." in card(text, 3)
    served = "python -m finetune serve run='" + str(whole.path.parent) + "/it'\"'\"'s a run'"
    assert served in card(text, 4) and "the same answer to 7 of 8 prompts" in card(text, 4)


def test_a_gain_is_said_only_where_the_scores_say_it(run_dir: RunDir) -> None:
    facts, told = gather(run_dir), read_json(run_dir.scores)
    told["gates"] = []
    worse = {"test": "McNemar", "wins": 1, "losses": 9, "p": 0.021}
    for changed, short, tone in (
        ({}, "No gain shown", "open"),
        ({"gain": True}, "Yes", "good"),
        ({"tests": told["tests"] | {"tuned_vs_base": worse}}, "No, it got worse", "bad"),
        ({"gain": True, "gates": [{"gate": "g", "passed": False}]}, "Yes, but a gate is not passed", "bad"),
    ):
        answer = better(facts | {"scores": told | changed})
        assert (answer.short, answer.tone) == (short, tone)


def test_answers_that_are_no_choices_are_judged_by_the_measure_of_their_domain(run_dir: RunDir) -> None:
    test = {"test": "paired", "wins": 40, "losses": 12, "p": 0.0001}
    metric = {"name": "token_f1", "rows": 90, "change": 0.21, "low": 0.12, "high": 0.3, "test": test}
    metric |= {"base": {"value": 0.31, "low": 0.25, "high": 0.37}, "tuned": {"value": 0.52, "low": 0.45, "high": 0.59}}
    told = scores([]) | {"metric": metric, "gain": True, "gates": []}
    answer = better(gather(run_dir) | {"scores": told})
    assert answer.short == "Yes" and [tuple(" ".join(c.split()) for c in row) for row in answer.table[:2]] == [
        ("token_f1", "31.0 % (25.0 to 37.0)", "52.0 % (45.0 to 59.0)"),
        ("gain, points", "", "+21.0 (+12.0 to +30.0)"),
    ]
    worse = metric | {"test": test | {"wins": 12, "losses": 40}}
    assert better(gather(run_dir) | {"scores": told | {"metric": worse, "gain": False}}).tone == "bad"
    write_json(run_dir.scores, told)
    words = Page(written(run_dir)).text
    assert "token_f1 90 31.0 % (25.0 to 37.0) 52.0 % (45.0 to 59.0) +21.0 points (+12.0 to +30.0) 40 12 0.0001" in words


def test_drift_that_chance_explains_is_no_regression_and_the_page_calls_nothing_safe(whole: RunDir) -> None:
    told = read_json(whole.scores)
    assert "Regression against base" in drift(told)[0]
    told["safety"]["tests"]["refusal"]["p"] = 0.2
    told["safety"]["tests"]["incoherence"] |= {"p": 0.01, "change": 0.05, "low": 0.01, "high": 0.09}
    assert drift(told) == ["Regression against base: answers without sense +5.0\u00a0points (p = 0.01)."]
    told["safety"]["tests"]["incoherence"]["change"] = -0.05
    assert drift(told) == ["Refusals, over-refusals and incoherence: no regression against base is shown."]
    told["safety"]["tests"]["refusal"]["p"] = 1e-9
    told["safety"]["tuned"]["harmful"]["refuse"] = {"value": 0.95}  # refuses more: no regression
    assert "no regression" in drift(told)[0]
    assert not re.search(r"\bsafe\b", Page(whole.report.read_text(encoding="utf-8")).text, re.IGNORECASE)


def test_without_the_later_keys_their_parts_are_left_out(run_dir: RunDir) -> None:
    words = Page(written(run_dir)).text
    assert not re.search(r"Tasks|Forgetting|Safety drift|Slices|How the router", words)
    told = read_json(run_dir.scores) | dict.fromkeys(("tasks", "slices", "forgetting", "safety"))
    write_json(run_dir.scores, told)
    assert not re.search(r"Tasks|Forgetting|Safety drift|Slices", Page(written(run_dir)).text)


def test_tasks_forgetting_drift_slices_and_gates_are_in_tables(whole: RunDir) -> None:
    words = Page(whole.report.read_text(encoding="utf-8")).text.replace(" " + NASTY, "")
    for part in (
        "mmlu exact_match 321 41.2 % (37.2 to 45.2) 43.7 % (39.7 to 47.7) +2.5 points (+0.4 to +4.6) 31 23 0.04",
        "… subject law 87 30.0 % (26.0 to 34.0) 39.0 % (35.0 to 43.0)",
        "words word_perplexity 60 12.5 (11 to 14) 10.2 (9 to 11.5)",
        "5 items are in the training rows by the index exam . Without them: base 41.1 % (37.1 to 45.1), tuned 43.3 %",
        "general 500 55.0 % (52.0 to 60.0) 53.0 % (50.0 to 58.0) \u22122.1 points (\u22123.9 to \u22120.3)",
        "harmful refuses 81.0 % (80.5 to 81.5) 62.0 % (61.5 to 62.5)", "harmless refuses 4.0 % (3.5 to 4.5) 4.5 %",
        "they agree with people on 94.7 % of 300 labelled answers", "seeds 1, 2, 3",
        "length short 6 40.0 % (37.0 to 45.0) 70.0 % (67.0 to 75.0) 4 1 0.37",
        "evaluate.max_forgetting ✓ passed 0.05 0.021 (0.003 to 0.039) within", "max_refusal_drop ✗ not passed 0.1 0.19",
        "1.58 (1.44 to 1.71)",
    ):  # fmt: skip
        assert part in words, part
    assert words.count("reference a") == 10  # ten samples side by side


def test_without_choices_there_is_a_loss_table_and_no_accuracy(run_dir: RunDir) -> None:
    write_json(run_dir.scores, scores([]))
    text = written(run_dir)
    assert "may be format alone" in text and "Right answers</b>" not in text
    assert "evaluate.min_gain ✗ not passed 0.123 \u2013" in Page(text).text


def test_the_coverage_table_says_plainly_what_is_in_4_bits(run_dir: RunDir) -> None:
    words = Page(written(run_dir)).text
    assert (
        "90.0 % of the base is really in 4 bits: attention, routed experts. Not in 4 bits: embeddings and head."
        in words
    )
    assert "dense MLPs" not in words
    rows = {row["name"]: row for row in tables.coverage_rows(coverage(routed_4bit=0))}
    assert rows["routed experts"]["stored"] == "16-bit" and rows["attention"]["stored"] == "4-bit"
    assert " ".join(tables.storage_sentence(list(rows.values())).split()) == (
        "10.0 % of the base is really in 4 bits: attention. Not in 4 bits: embeddings and head, routed experts."
    )
    rows = {row["name"]: row for row in tables.coverage_rows(coverage(routed_4bit=400))}
    assert " ".join(rows["routed experts"]["stored"].split()) == "50.0 % 4-bit, rest 16-bit"
    assert " ".join(tables.storage_sentence(list(rows.values())).split()) == (
        "50.0 % of the base is really in 4 bits: attention. Partly: routed experts. Not in 4 bits: embeddings and head."
    )
    assert tables.storage_sentence(tables.coverage_rows(coverage()[:1])) == "No weight of the base is in 4 bits."


def test_the_page_has_memory_rows_licences_versions_and_commands(run_dir: RunDir) -> None:
    words = Page(written(run_dir)).text
    for part in (
        "weights at rest 0.25 0.567 GiB -55.9 %", "peak while training 1.75 2.35 GiB -25.4 %",
        "highest while training 2.35", "sum 1.75 computed", "expert stacks, 4-bit 0.25", "highest while loading 1.23",
        "duplicate 1", "train 3 2 99 9 30 41", "Apache License 2.0", "CC-BY-4.0", "torch 2.13.0, peft 0.21.2",
        "hf/config.json 2 B", "same answer to 7 of 8 prompts", "Pass on the licence and the NOTICE file",
        f"python -m finetune verify run='{run_dir.path.parent}/it'\"'\"'s a run'",
    ):  # fmt: skip
        assert part in words, part
    assert "Not finished yet" not in words


def test_an_unfinished_run_gets_a_page_that_says_what_is_missing(run_dir: RunDir) -> None:
    run_dir.scores.unlink()
    run_dir.train.unlink()
    text = written(run_dir)
    assert "Not finished yet: train, evaluate. To go on: python -m finetune train run=" in Page(text).text
    assert "Not measured yet" in card(text, 1) and "Not trained yet" in card(text, 2)


@pytest.mark.parametrize("stage", ["data", "train", "evaluate", "merge", "export"])
def test_the_report_of_a_run_that_has_not_finished_is_refused_and_none_is_left(run_dir: RunDir, stage: str) -> None:
    path = left_by(run_dir)[stage]
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(
        RunError, match=f"RUN-002 .*the {stage} stage has not finished.*python -m finetune {stage} run="
    ):
        room.report(run_dir)
    assert not run_dir.report.exists()
    path.with_name("elsewhere").rename(path)
    room.report(run_dir)
    assert run_dir.report.is_file()


def test_a_run_that_has_only_begun_has_a_page_too(run_dir: RunDir) -> None:
    bare = RunDir(run_dir.path.parent / "bare")
    bare.path.mkdir()
    bare.recipe.write_bytes(run_dir.recipe.read_bytes())
    words = Page(written(bare)).text
    assert "Not finished yet: data, train, evaluate, merge, export." in words and "Not exported yet" in words


def test_money_is_reckoned_only_where_the_rate_is_of_the_device_that_it_ran_on(run_dir: RunDir) -> None:
    facts = gather(run_dir)
    assert {row[0]: row[2] for row in cost(facts).table}["money"] == reading.DASH  # a CPU, priced as an H100
    assert cost_notes(facts)[1] == "It ran on cpu, whose hour has no price in the recipe."
    on_gpu = facts | {"train": facts["train"] | {"device": "NVIDIA H100 80GB HBM3", "processes": 8, "seconds": 900}}
    told = {row[0]: row[2].replace("\u00a0", " ") for row in cost(on_gpu).table}
    assert told["device-hours"] == "2 h" and told["money"] == f"{2 * facts['recipe']['costs']['price_per_hour']:g} USD"
    measured = on_gpu | {"energy": {"kwh": 1.4, "how": "counters"}}
    assert cost(measured).table[2][2] == "1.4\u00a0kWh" and "Energy by counters." in cost_notes(measured)


def test_licence_rules_that_are_broken_or_open_are_said_first(run_dir: RunDir) -> None:
    from finetune.compose import recipe_yaml
    from finetune.recipe import Model

    model = Model(title="Base", licence="llama4")
    run_dir.recipe.write_text(recipe_yaml(Recipe(name="toy", model=model)))
    facts = gather(run_dir)
    undecided = [rule["rule"] for rule in facts["verdicts"] if rule["passed"] is None]
    assert "LIC-004" in undecided
    facts["verdicts"] = [rule | {"passed": None if rule["passed"] is None else True} for rule in facts["verdicts"]]
    told = licence(facts)
    assert (told.tone, told.short) == ("open", f"It depends: {len(undecided)} questions open")
    facts["verdicts"][0]["passed"] = False
    told = licence(facts)
    assert (told.tone, told.short) == ("bad", "No: 1 rule broken") and facts["verdicts"][0]["what"] in told.notes[0]


def test_the_seconds_of_a_stage_are_those_of_all_its_attempts() -> None:
    def event(what: str, stage: str, second: int) -> dict[str, Any]:
        return {"what": what, "stage": stage, "when": f"2026-11-25T10:00:{second:02}Z"}

    happened = [
        event("started", "train", 0), event("stopped", "train", 20),
        {"what": "allowed", "when": "2026-11-25T10:00:21Z"},
        event("continued", "train", 30), event("finished", "train", 40), event("started", "merge", 41),
    ]  # fmt: skip
    assert stage_seconds(happened) == [("train", 30.0, "finished"), ("merge", 0.0, "has not ended")]


def test_the_interval_of_the_gain_holds_what_it_should() -> None:
    """Against simulation: rows are drawn again and again from known shares, and the truth is inside in 95 %."""
    import numpy as np

    dice = np.random.default_rng(5)
    shares = {"wins": 0.3, "losses": 0.1, "both": 0.4}
    inside = 0
    for _ in range(2000):
        wins, losses, both, _ = dice.multinomial(120, [*shares.values(), 0.2])
        told = {
            "tests": {"tuned_vs_base": {"wins": int(wins), "losses": int(losses)}}, "rows_with_choices": 120,
            "confidence": 0.95, "base": {"accuracy": (both + losses) / 120}, "tuned": {"accuracy": (both + wins) / 120},
        }  # fmt: skip
        found = tables.gain(told)
        assert found and found["mean"] == pytest.approx((wins - losses) / 120)
        inside += found["low"] <= 0.2 <= found["high"]
    assert 0.935 < inside / 2000 < 0.97


def test_plots_are_xml_in_the_colours_of_the_page_and_keep_only_the_ids_they_use() -> None:
    steps = list(range(1, 900))
    drawn = [
        plots.intervals([("tuned", 0.7, 0.6, 0.8), ("base", 0.4, 0.3, 0.5)], 0.95),
        plots.loss_curve([1, 2, 3], [3.0, 2.0, 1.0], [(2, 2.5)]),
        plots.curve("norm", steps, [1 / step for step in steps], "Norm", "norm"),
        plots.pairs("tasks", [plots.Pair("a $x_1$ <b>", (0.1, 0, 0.2), (0.5, 0.4, 0.6))], "Tasks & more", "%"),
        plots.bars("memory", [("weights", 1.0, 2.0), ("peak", 3.0, None)], "Memory", "GiB"),
        plots.router_heat([[5, 0, 3], [1, 2, 3]], ["0", "1"]),
        plots.losses_of_runs([("A", [1, 2], [2.0, 1.0]), ("B", [1, 2], [3.0, 1.0])]),
        plots.gains_of_runs([("A", 0.5, 0.4, 0.6)], "%"),
    ]
    ids: list[str] = []
    for svg in drawn:
        root = ElementTree.fromstring(svg)
        assert root.find("{http://www.w3.org/2000/svg}title") is not None and 'role="img"' in svg
        assert "var(--" in svg and not re.search(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]", svg) and "<metadata" not in svg
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set()
        own = re.findall(r'\bid="([^"]+)"', svg)
        used = set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg))
        assert used == set(own)
        ids += own
    assert len(ids) == len(set(ids))
    assert "a $x_1$ &lt;b&gt;" in drawn[3]
    assert drawn[0] == plots.intervals([("tuned", 0.7, 0.6, 0.8), ("base", 0.4, 0.3, 0.5)], 0.95)


def seen_axes(draw: Any) -> Any:
    """The axes of a plot when it is about to be written."""
    seen: list[Any] = []
    with patch.object(plots, "_svg", lambda figure, title: seen.append(figure.axes[0]) or ""):
        draw()
    return seen[0]


def test_the_dot_of_a_share_stands_where_the_axis_says() -> None:
    axes = seen_axes(lambda: plots.intervals([("tuned", 0.7, 0.6, 0.8), ("base", 0.4, 0.3, 0.5)], 0.95))
    lines = [(list(map(float, line.get_xdata())), list(line.get_ydata())) for line in axes.lines]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["base", "tuned"]
    assert lines == [([30.0, 50.0], [0, 0]), ([40.0], [0]), ([60.0, 80.0], [1, 1]), ([70.0], [1])]


def test_the_heat_map_shows_shares_of_a_layer_and_crosses_where_nothing_went() -> None:
    axes = seen_axes(lambda: plots.router_heat([[6, 0, 3, 3], [10, 10, 10, 10]], ["3", "7"]))
    opacity = axes.images[0].get_array()[:, :, 3]
    assert opacity[0].tolist() == pytest.approx([1.0, 0.0, 0.5, 0.5]) and opacity[1].tolist() == pytest.approx(
        [0.5] * 4
    )
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in crosses] == [([1], [0])]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["3", "7"]


def test_a_long_curve_is_drawn_as_means_and_a_big_router_stays_small(run_dir: RunDir) -> None:
    steps, values = plots.thinned(list(range(1, 100_001)), [float(i % 2) for i in range(100_000)])
    assert len(steps) == len(values) <= plots.MOST_POINTS and steps[-1] == 100_000
    assert set(values) == {0.5}
    text = written(with_everything(run_dir, layers=94, experts=256, updates=20_000))
    assert 200_000 < len(text.encode()) < 2_000_000


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (reading.number(None), "\u2013"), (reading.number(0), "0"), (reading.number(12345), "12\u202f345"),
        (reading.number(12345.6), "12\u202f346"), (reading.number(0.012345), "0.0123"),
        (reading.span(0.2), "under 1 s"), (reading.span(91.5), "91.5\u00a0s"), (reading.span(5400), "90\u00a0min"),
        (reading.span(36_000), "10\u00a0h"), (reading.span(864_000), "10\u00a0days"), (reading.span(None), "\u2013"),
        (reading.small(0.004, "kWh"), "under 0.01\u00a0kWh"), (reading.small(0.0, "h"), "0\u00a0h"),
        (reading.size(1023), "1023 B"), (reading.size(1024), "1 KiB"), (reading.size(3 * 2**30), "3.0 GiB"),
        (reading.share({"value": 0.5, "low": 0.4, "high": 0.6}), "50.0\u00a0% (40.0 to 60.0)"),
        (reading.share({"value": None, "low": None, "high": None}), "\u2013"), (reading.share(0.25), "25.0\u00a0%"),
        (reading.change({"mean": -0.02, "low": -0.05, "high": 0.01}), "\u22122.0\u00a0points (\u22125.0 to +1.0)"),
        (reading.chance(0.0432), "0.04"), (reading.chance(0.5), "0.50"), (reading.chance(None), "\u2013"),
        (str(reading.code("type `a <b>` now")), "type <code>a &lt;b&gt;</code> now"),
        (str(reading.code("a ` <b>")), "a ` &lt;b&gt;"),
        (list(reading.flat({"rows": [1] * 201})), [("rows", "201 entries")]),
    ],
)  # fmt: skip
def test_numbers_are_written_for_reading(told: Any, words: Any) -> None:
    assert told == words
