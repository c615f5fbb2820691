"""Facts become HTML: `page(facts)`. What comes from files is escaped; only our own SVG and style are not."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from finetune.report import plots
from finetune.report.answers import answers, cost_notes, drift
from finetune.report.reading import FILTERS, bounds, has, side
from finetune.report.tables import coverage_rows, moments, router_rows, router_sentence, storage_sentence

HERE = Path(__file__).parent
MOST_PAIRS = 24
"""Rows that a plot of base and tuned has room for; a table has all."""


def page(facts: dict[str, Any]) -> str:
    """The whole page of one run, from what `gather` gives."""
    scores, train = facts["scores"], facts["train"]
    coverage = coverage_rows(train["coverage"]) if train else []
    router = router_rows(train) if train else []
    return render(
        "page.html.jinja",
        facts,
        answers=answers(facts),
        cost_notes=cost_notes(facts),
        drift=drift(scores) if scores else [],
        coverage=coverage,
        storage=storage_sentence(coverage) if coverage else "",
        router=router,
        routed=router_sentence(router) if router else "",
        moments=moments(train) if train and train["steps"] else None,
        plots={name: Markup(svg) for name, svg in drawings(facts, router).items()},
    )


def render(template: str, *values: dict[str, Any], **more: Any) -> str:
    """A template of this folder with values; a name that is not there is an error."""
    return str(_environment().get_template(template).render(*values, **more))


def drawings(facts: dict[str, Any], router: list[dict[str, Any]]) -> dict[str, str]:
    """Name -> SVG of every plot that there are figures for."""
    scores, train = facts["scores"], facts["train"]
    drawn: dict[str, str] = {}
    if scores and scores["majority"]:
        sides = (("tuned", "tuned"), ("base", "base"), ("always one answer", "majority"))
        rows = [(name, scores[key]["accuracy"], scores[key]["low"], scores[key]["high"]) for name, key in sides]
        drawn["intervals"] = plots.intervals(rows, scores["confidence"])
    for name, rows_of, title in (
        ("tasks", _tasks(scores), "Base and tuned on every task, with intervals"),
        ("forgetting", _sets(scores, "forgetting", "sets", "name"), "Base and tuned on general questions"),
        ("slices", _sets(scores, "slices", "", "value"), "Base and tuned by slice, with intervals"),
    ):
        if rows_of:
            drawn[name] = plots.pairs(name, rows_of[:MOST_PAIRS], title, "%")
    if train and train["steps"]:
        drawn |= _training(train)
    if router:
        drawn["router"] = plots.router_heat([row["tokens"] for row in router], [row["layer"] for row in router])
    memory = [(row["name"], row["measured"], row["planned"]) for row in facts["compared"] if row["unit"] == "GiB"]
    if memory:
        drawn["memory"] = plots.bars("memory", memory, "Memory planned and measured", "GiB")
    if any(seconds for _, seconds, _ in facts["stages"]):
        stages = [(name, seconds, None) for name, seconds, _ in facts["stages"]]
        drawn["stages"] = plots.bars("stages", stages, "Seconds of every stage", "seconds")
    return drawn


def _training(train: dict[str, Any]) -> dict[str, str]:
    steps = train["steps"]
    numbers = [step["step"] for step in steps]
    heldout = [(entry["step"], entry["loss"]) for entry in has(train, "heldout") or []]
    drawn = {"loss": plots.loss_curve(numbers, [step["loss"] for step in steps], heldout)}
    for name, key, title, label in (
        ("rate", "lr", "Learning rate by update", "learning rate"),
        ("norm", "grad_norm", "Gradient norm by update", "gradient norm"),
    ):
        drawn[name] = plots.curve(name, numbers, [step[key] for step in steps], title, label)
    if speeds := moments(train)["speeds"]:
        places, values = zip(*speeds, strict=True)
        drawn["speed"] = plots.curve("speed", places, values, "Tokens per second by update", "tokens/s")
    return drawn


def _tasks(scores: Any) -> list[plots.Pair]:
    """Tasks whose figures are shares of 1; others stand in the table only."""
    return _pairs([(entry["task"], entry) for entry in has(has(scores, "tasks"), "sets") or []])


def _sets(scores: Any, key: str, inner: str, name: str) -> list[plots.Pair]:
    found = has(has(scores, key), inner) if inner else has(scores, key)
    return _pairs([(str(entry[name]), entry) for entry in found or []])


def _pairs(entries: list[tuple[str, dict[str, Any]]]) -> list[plots.Pair]:
    drawn = []
    for name, entry in entries:
        values = []
        for who in ("base", "tuned"):
            middle, (low, high) = side(has(entry, who)), bounds(has(entry, who))
            if middle is not None and low is not None and high is not None and 0 <= low <= middle <= high <= 1:
                values.append((middle, low, high))
        if len(values) == 2:
            drawn.append(plots.Pair(name, values[0], values[1]))
    return drawn


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    environment.globals["style"] = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    return environment
