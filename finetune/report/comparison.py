"""Several runs on one page: `compare_runs(run_dirs)`. Settings where they differ, gains, losses, cost, licences."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from finetune.report import plots
from finetune.report.answers import cost, drift, licence
from finetune.report.gather import Facts, gather, read
from finetune.report.reading import DASH, flat, has
from finetune.report.render import render
from finetune.report.tables import gain
from finetune.rundir import RunDir

if TYPE_CHECKING:
    from finetune.pairwise import Tested

APART = ("purpose", "runs_dir", "cache_dir", "network")
"""Settings that say nothing about the result."""
MODEL = "model.name"
"""Where this differs, the rest of the base's card does too, and is left out."""
FEWEST, MOST = 2, 26
"""Runs that one page can compare: each has a letter."""


def compare_runs(run_dirs: Sequence[RunDir], tested: Sequence[Tested]) -> str:
    """The HTML of the comparison of runs that have scores; `tested` is every run but the first against it."""
    runs = [Run(letter, run_dir) for letter, run_dir in zip(string.ascii_uppercase, run_dirs, strict=False)]
    facts = [run.facts for run in runs]
    names = dict(zip([run.letter for run in runs], facts, strict=True))
    return render(
        "comparison.html.jinja",
        runs=[run.row() for run in runs],
        differences=differences([fact["recipe"] for fact in facts]),
        same_rows=same_heldout(run_dirs, facts),
        best=best(names),
        tested=[(string.ascii_uppercase[each.run], each) for each in tested],
        methods=methods(tested),
        plots={name: Markup(svg) for name, svg in drawings(names).items()},
        recipes=sorted({fact["recipe"]["name"] for fact in facts}),
        program=facts[0]["program"],
    )


class Run:
    """One run with its letter, which stands for it in plots and tables."""

    def __init__(self, letter: str, run_dir: RunDir) -> None:
        self.letter, self.facts = letter, gather(run_dir)

    def row(self) -> dict[str, Any]:
        """What the table says of it."""
        facts, scores = self.facts, self.facts["scores"]
        return {
            "letter": self.letter,
            "name": facts["name"],
            "path": facts["run"],
            "base_title": facts["recipe"]["model"]["title"] or facts["recipe"]["model"]["name"],
            "scale": facts["recipe"]["scale"],
            "missing": facts["missing"],
            "scores": scores,
            "gain": gain(scores),
            "forgetting": has(scores, "forgetting"),
            "drift": drift(scores),
            "failed": [gate["gate"] for gate in scores["gates"] if not gate["passed"]],
            "cost": {row[0]: row[2] for row in cost(facts).table},
            "parity": facts["parity"],
            "licence": licence(facts),
            "train": facts["train"],
        }


def differences(recipes: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(setting, its value in every run) of the settings that are not the same in all."""
    settings = [dict(flat(recipe)) for recipe in recipes]
    names = dict.fromkeys(name for found in settings for name in found)
    told = [(name, [found[name] if name in found else DASH for found in settings]) for name in names]
    told = [(name, values) for name, values in told if len(set(values)) > 1 and name.split(".")[0] not in APART]
    other_base = any(name == MODEL for name, _ in told)
    return [(name, values) for name, values in told if not (other_base and name.startswith("model.") and name != MODEL)]


def same_heldout(run_dirs: Sequence[RunDir], facts: Sequence[Facts]) -> bool | None:
    """Whether all were scored on the same held-out rows, by the hashes of their records; None where one lacks it."""
    seen = set()
    for run_dir, fact in zip(run_dirs, facts, strict=True):
        name = _heldout_file(run_dir, has(read(run_dir.record), "outputs") or {})
        if not name:
            return None
        settings, rows = fact["recipe"]["evaluate"], has(has(has(fact["data"], "splits"), "heldout"), "rows")
        drawn = bool(rows) and 0 < settings["rows"] < rows  # then the seed chooses
        seen.add((name, settings["rows"] if drawn else 0, fact["recipe"]["seed"] if drawn else 0))
    return len(seen) == 1


def methods(tested: Sequence[Tested]) -> list[str]:
    """How each measure was tested and its interval made, a phrase each, said once for all runs."""
    every = [d for each in tested for d in each.differences]
    return list(
        dict.fromkeys(
            f"{d.measure}: {d.test}" + (f"; interval: {d.interval}" if d.low is not None else "") for d in every
        )
    )


def best(names: dict[str, Facts]) -> list[str]:
    """Which run has the lowest loss and which the most right answers, a sentence each; no claim of a difference."""
    told = []
    losses = {letter: fact["scores"]["tuned"]["loss"] for letter, fact in names.items()}
    shares = {letter: fact["scores"]["tuned"]["accuracy"] for letter, fact in names.items()}
    lowest = min(losses, key=lambda letter: losses[letter])
    told.append(f"Lowest held-out loss: run {lowest}, {losses[lowest]:.4f} nats per token.")
    asked = {letter: share for letter, share in shares.items() if share is not None}
    if asked:
        top = max(asked.values())
        who = [letter for letter, share in asked.items() if share == top]
        runs = f"run {who[0]}" if len(who) == 1 else f"runs {' and '.join(who)}"
        told.append(f"Most right answers: {runs}, {100 * top:.1f} %.")
    return told


def drawings(names: dict[str, Facts]) -> dict[str, str]:
    """Name -> SVG of every plot that there are figures for."""
    curves = [
        (letter, [step["step"] for step in fact["train"]["steps"]], [step["loss"] for step in fact["train"]["steps"]])
        for letter, fact in names.items()
        if fact["train"] and fact["train"]["steps"]
    ]
    shares = [
        (letter, side["accuracy"], side["low"], side["high"])
        for letter, side in ((letter, fact["scores"]["tuned"]) for letter, fact in names.items())
        if side["accuracy"] is not None
    ]
    drawn = {"losses": plots.losses_of_runs(curves)} if curves else {}
    if shares:
        drawn["gains"] = plots.gains_of_runs(shares, "right answers of the tuned model, % (line: interval)")
    return drawn


def _heldout_file(run_dir: RunDir, outputs: dict[str, str]) -> str:
    """The hash of the held-out rows in a record, whatever kind of file they are in."""
    folder = Path(run_dir.data.name)
    return next(
        (sha for name, sha in outputs.items() if Path(name).parent == folder and Path(name).stem == "heldout"), ""
    )
