"""Runs tested against the first of them, row by row on the same held-out rows: `against_first(run_dirs)`.

What is compared is the tuned model of each. Rows are the same where `scores_rows.jsonl` of both has their hashes; where
the rows are not the same, or a run is older than that file, nothing is tested and it is said. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from finetune.compose import read_recipe
from finetune.evaluate.intervals import change_of, holm, token_loss_change
from finetune.evaluate.rows import read_lines
from finetune.evaluate.verdict import SIGNIFICANCE, by_group
from finetune.rundir import RunDir, read_json

RIGHT, LOSS, GROUPED = "right answers", "loss, nats per token", ", each group once"
"""Measures, and what stands behind one of which each group is counted once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What one measure of a run is more or less than that of the first."""

    measure: str
    """What was measured: `right answers`, a metric, or the loss."""
    rows: int
    """Rows that it was measured on, in both runs."""
    change: float
    """This run less the first: a fraction, of the loss nats per answer token."""
    low: float | None
    """Lower end of its interval."""
    high: float | None
    """Upper end of its interval."""
    interval: str
    """Name of the interval."""
    better: int
    """Rows or groups on which this run is better."""
    worse: int
    """Rows or groups on which the first is better."""
    test: str
    """Name of the paired test."""
    p: float | None
    """Its p-value; None where there is too little to test."""
    adjusted: float | None = None
    """The same after Holm's correction over all runs; equal to it where there are only two."""

    @property
    def shown(self) -> bool:
        """Whether it is more than chance explains."""
        return self.adjusted is not None and self.adjusted < SIGNIFICANCE

    def phrase(self) -> str:
        """The difference in words: `right answers +4.2 points (p = 0.02)`."""
        size = f"{self.change:+.4f}" if self.measure == LOSS else f"{100 * self.change:+.1f} points"
        return f"{self.measure} {size} (p = {self.adjusted:.1g})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tested:
    """A run against the first."""

    run: int
    """Its place among the runs; the first has 0 and is not here."""
    rows: int = 0
    """Held-out rows that both have; 0 where nothing was tested."""
    why_not: str = ""
    """Why nothing was tested, with places for the names of both runs; empty where something was."""
    notes: list[str] = field(default_factory=list)
    """What of it could not be tested, a sentence each."""
    differences: list[Difference] = field(default_factory=list)
    """A measure each."""

    def sentence(self, name: str, first: str) -> str:
        """What the tests say of this run, `name`, against the first."""
        if self.why_not:
            return f"{name} is not tested against {first}: {self.why_not.format(first=first, name=name)}."
        grouped = {d.measure.removesuffix(GROUPED): d for d in self.differences if d.measure.endswith(GROUPED)}
        shown = []
        for d in self.differences:
            if d.shown and d.measure not in (g.measure for g in grouped.values()):
                alone = grouped[d.measure] if d.measure in grouped else d
                weak = (
                    "" if alone.shown else f", which counting each group once does not show (p = {alone.adjusted:.2g})"
                )
                shown.append(d.phrase() + weak)
        said = f"{name} against {first} on the same {self.rows} held-out rows: "
        said += "; ".join(shown) if shown else "no difference is shown" if self.differences else "nothing to test"
        return " ".join([f"{said}.", *self.notes])


def against_first(run_dirs: Sequence[RunDir]) -> list[Tested]:
    """A value for every run but the first; all of them need scores. Reads the runs and changes nothing.

    p-values are adjusted over the runs, each measure by itself: with many runs one is below 0.05 by chance.
    """
    first, *others = [_Results.of(run_dir) for run_dir in run_dirs]
    found = [_tested(place, first, other) for place, other in enumerate(others, 1)]
    every = [(tested.run, d.measure, d.p) for tested in found for d in tested.differences if d.p is not None]
    adjusted: dict[tuple[int, str], float] = {}
    for measure in {measure for _, measure, _ in every}:
        runs, values = zip(*((run, p) for run, of, p in every if of == measure), strict=True)
        adjusted |= {(run, measure): value for run, value in zip(runs, holm(values), strict=True)}

    def corrected(run: int, d: Difference) -> Difference:
        return d if d.p is None else replace(d, adjusted=adjusted[run, d.measure])

    return [replace(tested, differences=[corrected(tested.run, d) for d in tested.differences]) for tested in found]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Results:
    """What a run left row by row."""

    lines: dict[str, dict[str, Any]]
    """Hash of a row -> its line."""
    lacks: str
    """Why there are none; empty where there are."""
    metric: str
    """Name of the metric that the marks are of; empty where there is none."""
    confidence: float
    """Level of the intervals."""
    seed: int
    """Of what is drawn."""

    @classmethod
    def of(cls, run_dir: RunDir) -> _Results:
        """The results of a run that has scores."""
        scores, recipe = read_json(run_dir.scores), read_recipe(run_dir.recipe)
        lines, lacks = [], ""
        if not run_dir.scores_rows.is_file():
            lacks = f"has no {run_dir.scores_rows.name}: an older version evaluated it"
        else:
            try:
                lines = read_lines(run_dir.scores_rows)
            except (OSError, ValueError):
                lacks = f"has a {run_dir.scores_rows.name} that cannot be read"
        by_hash = {line["row"]: line for line in lines}
        if not lacks and not (len(by_hash) == len(lines) == scores["rows"]):
            lacks = f"has a {run_dir.scores_rows.name} that is not of its scores"
        metric = scores["metric"] if "metric" in scores else None
        return cls(
            lines={} if lacks else by_hash,
            lacks=lacks,
            metric=metric["name"] if metric else "",
            confidence=recipe.evaluate.confidence,
            seed=recipe.seed,
        )


def _tested(place: int, first: _Results, other: _Results) -> Tested:
    if first.lacks or other.lacks:
        why = f"{{first}} {first.lacks}" if first.lacks else f"{{name}} {other.lacks}"
        return Tested(run=place, why_not=why)
    if first.lines.keys() != other.lines.keys():
        both = len(first.lines.keys() & other.lines.keys())
        sizes = f"{both} of {len(first.lines)} and {len(other.lines)} are in both"
        return Tested(run=place, why_not=f"their held-out rows are not the same: {sizes}")
    pairs = [(line, other.lines[name]) for name, line in first.lines.items()]
    notes: list[str] = []
    found: list[Difference] = []
    asked = [pair for pair in pairs if None not in (pair[0]["tuned"]["right"], pair[1]["tuned"]["right"])]
    if asked:
        found += _marks(RIGHT, asked, "right", first.confidence)
    if {first.metric, other.metric} - {"", "accuracy"}:  # accuracy is those right answers
        found += _metric(first, other, pairs, notes)
    if all(a["input"] == b["input"] and a["tokens"] == b["tokens"] for a, b in pairs):
        found.append(_loss(pairs, first))
    else:
        notes.append(
            "The losses are per token of other tokens (tokenizer, chat template or length) and are not tested."
        )
    return Tested(run=place, rows=len(pairs), notes=notes, differences=found)


def _metric(first: _Results, other: _Results, pairs: Sequence[Any], notes: list[str]) -> list[Difference]:
    """The difference in the metric of generated answers, or a note that says why there is none."""
    if first.metric != other.metric:
        names = " and ".join(name or "none" for name in (first.metric, other.metric))
        notes.append(f"The metric is not the same ({names}) and is not tested.")
        return []
    places = [[pair[side]["tuned"]["mark"] is not None for pair in pairs] for side in (0, 1)]
    if places[0] != places[1]:
        notes.append(
            f"Other rows were marked by {first.metric}, so it is not tested: evaluate.metric_rows=0 marks all."
        )
        return []
    marked = [pair for pair, known in zip(pairs, places[0], strict=True) if known]
    return _marks(first.metric, marked, "mark", first.confidence) if marked else []


def _marks(measure: str, pairs: Sequence[Any], key: str, confidence: float) -> list[Difference]:
    """The difference of marks by row; where they are right or wrong, also with each group counted once."""
    old, new = ([float(pair[side]["tuned"][key]) for pair in pairs] for side in (0, 1))
    told = change_of(old, new, confidence)
    found = [_difference(measure, len(pairs), told)]
    groups = [str(pair[0]["group"]) for pair in pairs]
    if set(old) | set(new) <= {0.0, 1.0} and len(set(groups)) > 1:
        test = by_group([mark == 1 for mark in new], [mark == 1 for mark in old], groups)
        if test:
            whole = {"change": told["change"], "low": None, "high": None, "interval": "none", "test": test}
            found.append(_difference(measure + GROUPED, len(pairs), whole))
    return found


def _loss(pairs: Sequence[Any], first: _Results) -> Difference:
    tokens = [pair[0]["tokens"] for pair in pairs]
    old, new = (
        [pair[side]["tuned"]["loss"] * count for pair, count in zip(pairs, tokens, strict=True)] for side in (0, 1)
    )
    groups = [str(pair[0]["group"]) for pair in pairs]
    return _difference(LOSS, len(pairs), token_loss_change(old, new, tokens, groups, first.confidence, first.seed))


def _difference(measure: str, rows: int, told: dict[str, Any]) -> Difference:
    test, names = told["test"], ("change", "low", "high", "interval")
    counts = {"better": test["wins"], "worse": test["losses"], "test": test["test"], "p": test["p"]}
    return Difference(measure=measure, rows=rows, **{name: told[name] for name in names}, **counts)
