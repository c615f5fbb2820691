"""The first screen: did it get better, what did it cost, may I use it, how do I serve it. Each with its evidence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune.report.reading import chance, change, has, number, percent, points, share, small, span
from finetune.report.tables import gain

Facts = dict[str, Any]
SIGNIFICANCE = 0.05
"""As in the verdict of scores.json: a difference counts as shown when a paired test gives p below this."""
MARKS = {"good": "\u2713", "bad": "\u2717", "open": "?", "none": "\u2013", "plain": ""}
"""Tone -> the sign that stands beside its colour."""


@dataclass(kw_only=True, slots=True)
class Answer:
    """One of the four answers."""

    question: str
    """What a person wants to know."""
    short: str
    """The answer in a few words."""
    tone: str
    """`good`, `bad`, `open`, `none` yet or a `plain` fact; colour and sign follow it, the words say it too."""
    sentence: str = ""
    """The same in a sentence."""
    table: list[tuple[str, ...]] = field(default_factory=list)
    """Rows of figures under it."""
    head: tuple[str, ...] = ()
    """Names of the table's columns."""
    notes: list[str] = field(default_factory=list)
    """What else must be known, a sentence each; `words in backticks` are code."""
    commands: list[str] = field(default_factory=list)
    """What to type."""
    more: str = ""
    """The section that has the rest."""

    @property
    def mark(self) -> str:
        """The sign of the tone."""
        return MARKS[self.tone]


def answers(facts: Facts) -> list[Answer]:
    """The four answers from what `gather` gives."""
    return [better(facts), cost(facts), licence(facts), serve(facts)]


def better(facts: Facts) -> Answer:
    """Whether the tuned model beats its base, by the verdict of scores.json, its gates, forgetting and drift."""
    question, scores = "Did it get better?", facts["scores"]
    if not scores:
        return Answer(question=question, short="Not measured yet", tone="none", notes=_next(facts, "evaluate"))
    short, tone = _judged(scores)
    failed = [gate["gate"] for gate in scores["gates"] if not gate["passed"]]
    told = Answer(question=question, short=short, tone=tone, sentence=scores["verdict"], more="quality")
    told.head = ("", "base", "tuned")
    base, tuned = scores["base"], scores["tuned"]
    if base["accuracy"] is not None:
        told.table.append(("right answers", share(base), share(tuned)))
    if metric := _other_metric(scores):
        told.table.append((metric["name"], share(metric["base"]), share(metric["tuned"])))
    if gain(scores):
        told.table.append(("gain, points", "", change(gain(scores)).replace("\u00a0points", "")))
    told.table.append(("loss, nats per token", number(base["loss"], 4), number(tuned["loss"], 4)))
    if failed:
        told.notes.append(f"Not passed: {', '.join(failed)}.")
        told.short, told.tone = f"{short}{', but' if tone == 'good' else ';'} a gate is not passed", "bad"
    elif scores["gates"]:
        told.notes.append(f"All {len(scores['gates'])} gates are passed.")
    told.notes += [*_forgotten(scores), *drift(scores)]
    return told


def cost(facts: Facts) -> Answer:
    """Hours, device-hours, energy and money, planned and measured."""
    question, plan, train = "What did it cost?", facts["plan"], facts["train"]
    planned = {row["name"]: row for part in ("work", "cost") for row in has(plan, part) or []}

    def said(name: str) -> float | None:
        return planned[name]["value"] if name in planned else None

    costs, hours = facts["recipe"]["costs"], said("hours")
    devices, money = said("device-hours"), said("price")
    spent = train["seconds"] * (has(train, "processes") or 1) if train else None
    whole = sum(seconds for _, seconds, _ in facts["stages"])
    unit = costs["currency"]
    paid = spent / 3600 * costs["price_per_hour"] if spent is not None and _priced(facts) else None
    rows: list[tuple[str, ...]] = [
        ("training", span(_seconds(hours)), span(train["seconds"] if train else None)),
        ("device-hours", small(devices, "h"), small(spent / 3600, "h") if spent is not None else span(None)),
        ("energy", small(said("energy"), "kWh"), small(facts["energy"]["kwh"], "kWh")),
        ("money", small(money, unit), small(paid, unit)),
    ]
    told = Answer(question=question, short="", tone="plain", table=rows, head=("", "planned", "measured"), more="cost")
    if not train:
        told.short, told.tone, told.notes = "Not trained yet", "none", _next(facts, "train")
        return told
    told.short = f"{small(paid, unit)}, {span(train['seconds'])}" if paid else span(train["seconds"])
    told.sentence = f"Trained on {has(train, 'processes') or 1} x {train['device']}"
    told.sentence += f"; all stages took {span(whole)}." if whole else "."
    return told


def cost_notes(facts: Facts) -> list[str]:
    """What the money rests on, and why a figure is missing."""
    costs, train = facts["recipe"]["costs"], facts["train"]
    rate = f"{costs['price_per_hour']:g} {costs['currency']} an hour of one {costs['device']}"
    notes = [f"Money is device-hours of the training times {rate}, the recipe's own figure."]
    if train and not _priced(facts):
        notes.append(f"It ran on {train['device']}, whose hour has no price in the recipe.")
    if train and facts["energy"]["kwh"] is None:
        notes.append(f"Energy {facts['energy']['how']}.")
    elif train:
        notes.append(f"Energy by {facts['energy']['how']}.")
    return notes


def licence(facts: Facts) -> Answer:
    """Whether licences of base and rows allow an export and its use, by the rules that are known here."""
    question, known, verdicts = "May I use it?", facts["licence"], facts["verdicts"]
    title = known["title"] if known else facts["recipe"]["model"]["licence"] or "not stated"
    told = Answer(question=question, short="", tone="open", more="licences")
    source = has(facts["data"], "source")
    told.head = ("", "licence", "commercial use")
    told.table = [("base", title, known["commercial"] if known else "not known here")]
    if source:
        told.table.append(("rows", source["licence"] or "not stated", "see its text"))
    said = facts["recipe"]["licence"]["use"]
    if verdicts is None:
        told.short = "Not known: the data card is gone"
        return told
    broken = [v for v in verdicts if v["passed"] is False]
    undecided = [v for v in verdicts if v["passed"] is None]
    if broken:
        told.short, told.tone = f"No: {_count(len(broken), 'rule')} broken", "bad"
    elif undecided:
        told.short = f"It depends: {_count(len(undecided), 'question')} open"
    else:
        told.short, told.tone = "No known rule forbids it", "good"
        if known and known["duties"]:
            told.short = f"Yes, with {_count(len(known['duties']), 'duty', 'duties')}"
    if not facts["applies"]:
        told.notes.append("This is what the real base asks; the random weights of a rehearsal are under no licence.")
    told.notes += [f"{v['rule']}: {v['what']}" for v in (broken or undecided)[:2]]
    if known and not broken:
        told.notes += [*known["duties"][:2]]
    use = "not said (licence.use)" if said == "not_said" else said
    told.notes.append(f"Meant for: {use}. Information, not legal advice.")
    return told


def serve(facts: Facts) -> Answer:
    """What was exported, and what to type to serve it."""
    question, formats = "How do I serve it?", facts["recipe"]["export"]["formats"]
    if not facts["exported"]:
        return Answer(question=question, short="Not exported yet", tone="none", notes=_next(facts, "export"))
    told = Answer(question=question, short=f"Ready as {', '.join(formats)}", tone="good", more="serving")
    told.commands = [f"python -m finetune serve run={facts['quoted']}"]
    proof = facts["parity"]
    if proof:
        same = f"the same answer to {proof['same_answers']} of {proof['answers']} prompts"
        told.sentence = f"The files answer as the trained model does: {same}, KL {number(proof['mean_kl'], 2)} nats."
    asked = [entry for entry in has(facts["clients"], "clients") or [] if entry["asked"]]
    if asked:
        names = ", ".join(f"{e['format']} by {e['client']} {e['version']}" for e in asked)
        told.notes.append(f"Loaded and asked: {names}.")
    unasked = [entry["format"] for entry in has(facts["clients"], "clients") or [] if not entry["asked"]]
    if unasked:
        told.notes.append(f"Not asked by its client: {', '.join(unasked)}.")
    return told


def drift(scores: Facts) -> list[str]:
    """A sentence per answer behaviour that got worse than the base's beyond chance; one that none did; or nothing."""
    safety = has(scores, "safety")
    if not safety:
        return []
    found = []
    for name, prompts, behaviour, worse_when_lower, words in BEHAVIOURS:
        test = has(has(safety, "tests"), name)
        before, after = _rate(safety, "base", prompts, behaviour), _rate(safety, "tuned", prompts, behaviour)
        moved, p = has(test, "change"), has(test, "p")
        if moved is None and before is not None and after is not None:
            moved = after - before
        if not moved or p is None or p >= SIGNIFICANCE or (moved < 0) != worse_when_lower:
            continue
        rates = f" {percent(before)} to {percent(after)}" if prompts else f" {points(moved)}"
        found.append(f"Regression against base: {words}{rates} (p = {chance(p)}).")
    return found or ["Refusals, over-refusals and incoherence: no regression against base is shown."]


BEHAVIOURS = (
    ("refusal", "harmful", "refuse", True, "refuses harmful prompts"),
    ("over_refusal", "benign", "refuse", False, "refuses harmless prompts"),
    ("incoherence", "", "", False, "answers without sense"),
)
"""Test, kind of prompts and behaviour (none where it is of several), whether less of it is worse, and in words."""


def _rate(safety: Facts, who: str, prompts: str, behaviour: str) -> float | None:
    found = has(has(has(safety, who), prompts), behaviour)
    return has(found, "value") if isinstance(found, dict) else found


def _forgotten(scores: Facts) -> list[str]:
    told = has(scores, "forgetting")
    if not told or has(told, "change") is None:
        return []
    low, high = has(told, "low"), has(told, "high")
    within = f" ({100 * low:+.1f} to {100 * high:+.1f})".replace("-", "\u2212") if None not in (low, high) else ""
    return [f"General questions: {points(told['change'])}{within} against base."]


def _judged(scores: Facts) -> tuple[str, str]:
    """The answer in a few words, and its tone: what the verdict of scores.json says, not more."""
    if scores["gain"]:
        return "Yes", "good"
    metric = _other_metric(scores)
    test = metric["test"] if metric else scores["tests"]["tuned_vs_base"]
    if test is None or (scores["majority"] is None and not metric):
        loss = scores["tests"]["loss"]
        shown = loss["p"] is not None and loss["p"] < SIGNIFICANCE
        if shown and loss["mean"] < 0:
            return "Lower loss; answers not judged", "open"
        return ("Higher loss", "bad") if shown else ("No difference shown", "open")
    if test["p"] < SIGNIFICANCE and test["losses"] > test["wins"]:
        return "No, it got worse", "bad"
    if test["p"] < SIGNIFICANCE and not metric:
        return "Better than base, not than one answer", "open"
    return "No gain shown", "open"


def _other_metric(scores: Facts) -> Facts | None:
    """The domain's own measure, where the answers are judged by another than right or wrong choices."""
    metric: Facts | None = has(scores, "metric")
    return metric if metric and metric["name"] != "accuracy" else None


def _next(facts: Facts, stage: str) -> list[str]:
    return [f"To go on: `python -m finetune {stage} run={facts['quoted']}`"]


def _priced(facts: Facts) -> bool:
    """Whether the recipe's rate is of the kind of device that it ran on: the price of a GPU is not that of a CPU."""
    priced, used = facts["recipe"]["costs"]["device"], str(facts["train"]["device"])
    return ("cpu" in priced.lower()) == ("cpu" in used.lower())


def _seconds(hours: float | None) -> float | None:
    return None if hours is None else hours * 3600


def _count(number_of: int, noun: str, plural: str = "") -> str:
    return f"{number_of} {noun if number_of == 1 else plural or noun + 's'}"
