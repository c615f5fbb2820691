"""What scores mean: intervals, paired tests, and a sentence that claims no more than they show. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

SIGNIFICANCE = 0.05
"""A difference counts as shown when a paired test gives p below this."""


def proportion(correct: int, rows: int, confidence: float) -> tuple[float, float, float]:
    """(share, low, high) with Wilson's score interval (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(correct, rows).proportion_ci(confidence_level=confidence, method="wilson")
    return correct / rows, float(interval.low), float(interval.high)


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> dict[str, Any]:
    """McNemar's exact two-sided test (1947): of the rows where exactly one is right, is either right more often?"""
    wins = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    losses = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    return {"test": "McNemar, exact, two-sided, by row", "wins": wins, "losses": losses, "p": _sign_p(wins, losses)}


def by_group(ours: Sequence[bool], theirs: Sequence[bool], groups: Sequence[str]) -> dict[str, Any] | None:
    """The exact sign test over groups: rows of one group resemble each other, so each group is counted once.

    None when every row is a group of its own, which `mcnemar` has tested already.
    """
    net: Counter[str] = Counter()
    for a, b, group in zip(ours, theirs, groups, strict=True):
        net[group] += int(a) - int(b)
    if len(net) == len(groups):
        return None
    wins, losses = sum(v > 0 for v in net.values()), sum(v < 0 for v in net.values())
    return {
        "test": f"sign test, exact, two-sided, over {len(net)} groups",
        "wins": wins,
        "losses": losses,
        "p": _sign_p(wins, losses),
    }


def loss_change(base: Sequence[float], tuned: Sequence[float], confidence: float) -> dict[str, Any]:
    """Mean change of the rows' losses (tuned - base, nats per token), with Student's paired t interval and p.

    `low`, `high` and `p` are null where rows or spread are too few for an interval.
    """
    from scipy.stats import ttest_1samp

    change = np.asarray(tuned, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    told: dict[str, Any] = {
        "test": "paired t, by row",
        "mean": float(change.mean()),
        "low": None,
        "high": None,
        "p": None,
    }
    if len(change) > 1 and change.std() > 1e-12 * (1.0 + abs(change.mean())):
        result = ttest_1samp(change, 0.0)
        interval = result.confidence_interval(confidence)
        told |= {"low": float(interval.low), "high": float(interval.high), "p": float(result.pvalue)}
    return told


def majority_answer(train: Sequence[str], heldout: Sequence[str]) -> str:
    """The most frequent answer of the training rows; of several, the one most frequent in held-out, then by name."""
    counts, here = Counter(train or heldout), Counter(heldout)
    return min(counts, key=lambda answer: (-counts[answer], -here[answer], answer))


def verdict(scores: dict[str, Any]) -> str:
    """One paragraph: what was measured and whether it is a gain. Without choices no gain is claimed."""
    seen = f"On {_count(scores['rows'], 'held-out row')}"
    if scores["groups"] is not None:
        unseen = "it never trained on" if not scores["groups_trained_on"] else "some of which it trained on"
        seen += f" from {_count(scores['groups'], 'group')} {unseen}"
    elif scores["groups_trained_on"]:  # passages of one text
        seen += " from a group it trained on"
    change = scores["tests"]["loss"]
    loss = f"the loss per answer token {_moved(scores['base']['loss'], scores['tuned']['loss'])}"
    if scores["metric"] is not None and scores["metric"]["name"] != "accuracy":
        return f"{seen}, {loss}{_interval(change)}. {_measured(scores['metric'])}"
    if scores["majority"] is None:
        return (
            f"{seen}, {loss}{_interval(change)}. These rows have no choices to be right or wrong about, and a lower "
            "loss may be format alone, so no gain in answers is claimed."
        )
    base, tuned, majority, tests = scores["base"], scores["tuned"], scores["majority"], scores["tests"]
    some = "" if scores["rows_with_choices"] == scores["rows"] else f" the {scores['rows_with_choices']} with choices"
    said = (
        f"{seen}, the tuned model answers{some} {_share(tuned)} right, its base {_share(base)}, "
        f"always answering '{majority['answer']}' {_share(majority)}."
    )
    return f"{said} {_judged(tests['tuned_vs_base'], tests['tuned_vs_majority'], tests, majority['answer'])}"


def is_gain(scores: dict[str, Any]) -> bool:
    """Tuned is right more often than base and than the majority answer, each with p below 0.05.

    By another metric than accuracy there is no majority answer to beat: better than base then suffices.
    """
    if scores["metric"] is not None and scores["metric"]["name"] != "accuracy":
        return _better(scores["metric"]["test"])
    if scores["majority"] is None:
        return False
    tests = scores["tests"]
    return all(_better(tests[name]) for name in ("tuned_vs_base", "tuned_vs_majority"))


def _measured(metric: dict[str, Any]) -> str:
    """What a metric of generated answers says, in words."""
    test, p = metric["test"], _p(metric["test"]["p"])
    base, tuned = (_share({"accuracy": side["value"], **side}) for side in (metric["base"], metric["tuned"]))
    said = f"Marked by {metric['name']}, the answers to {_count(metric['rows'], 'row')} reach {tuned}, base's {base}"
    if _better(test):
        return f"{said}. The gain is real by a paired test (p = {p})."
    return f"{said}. " + (f"It is worse than its base (p = {p})." if _worse(test) else f"No gain is shown (p = {p}).")


def _judged(base: dict[str, Any], majority: dict[str, Any], tests: dict[str, Any], answer: str) -> str:
    if _better(base) and _better(majority):
        told = (
            f"The gain is real by a paired test (p = {_p(base['p'])} against its base, "
            f"p = {_p(majority['p'])} against always answering '{answer}')."
        )
        grouped = [tests[f"{name}_by_group"] for name in ("tuned_vs_base", "tuned_vs_majority")]
        weak = [t for t in grouped if t is not None and not _better(t)]
        if weak:
            p = _p(max(t["p"] for t in weak))
            told += f" Counting each group once it is not shown (p = {p}): rows of one group resemble each other."
        return told
    if _worse(base):
        return f"It is worse than its base (p = {_p(base['p'])})."
    if _better(base):
        return (
            f"It beats its base (p = {_p(base['p'])}) but is not shown to beat always answering '{answer}' "
            f"(p = {_p(majority['p'])}), so no gain is claimed."
        )
    return f"A difference from its base is not shown (p = {_p(base['p'])}), so no gain is claimed."


def _better(test: dict[str, Any]) -> bool:
    return bool(test["wins"] > test["losses"] and test["p"] < SIGNIFICANCE)


def _worse(test: dict[str, Any]) -> bool:
    return bool(test["wins"] < test["losses"] and test["p"] < SIGNIFICANCE)


def _sign_p(wins: int, losses: int) -> float:
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def _share(part: dict[str, Any]) -> str:
    ends = "" if part["low"] is None else f" ({100 * part['low']:.0f} to {100 * part['high']:.0f} %)"
    return f"{100 * part['accuracy']:.0f} %{ends}"


def _moved(base: float, tuned: float) -> str:
    word = "fell" if tuned < base else "rose" if tuned > base else "stayed"
    return f"{word} from {base:.3f} to {tuned:.3f}" if word != "stayed" else f"stayed at {base:.3f}"


def _interval(change: dict[str, Any]) -> str:
    if change["low"] is None:
        return ""
    return f" (mean change of a row {change['mean']:+.3f}, interval {change['low']:+.3f} to {change['high']:+.3f})"


def _p(p: float) -> str:
    return f"{p:.2f}" if p >= 0.095 else f"{p:.1g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
