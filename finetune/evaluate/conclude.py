"""Everything in scores.json that follows from what both models made of the held-out rows. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune.evaluate import metric
from finetune.evaluate import verdict as say
from finetune.evaluate.gates import gates
from finetune.evaluate.intervals import token_loss
from finetune.evaluate.slices import slices

if TYPE_CHECKING:
    from finetune.evaluate.score import Row, RowScore
    from finetune.recipe import Evaluate


def conclude(
    rows: Sequence[Row],
    base: Sequence[RowScore],
    tuned: Sequence[RowScore],
    train: Any,
    settings: Evaluate,
    *,
    seed: int = 0,
    answered: metric.Marks | None = None,
) -> dict[str, Any]:
    """Shares, intervals, tests, slices, verdict and gates of the held-out rows; `answered` are marks of answers.

    `forgetting` and `safety` are null here: other prompts measure them, and `gates` is made anew after that.
    """
    level = settings.confidence
    asked = [i for i, row in enumerate(rows) if row["choices"]]
    groups, trained = {row["group"] for row in rows}, set(train["group"])
    marks = marks_of(rows, base, tuned, settings, answered)
    scores: dict[str, Any] = {
        "rows": len(rows),
        "rows_with_choices": len(asked),
        "groups": len(groups) if len(groups) > 1 else None,
        "groups_trained_on": len(groups & trained),
        "confidence": level,
        "base": side_of(rows, base, level, seed),
        "tuned": side_of(rows, tuned, level, seed),
        "metric": metric.told(marks, level, seed),
        "majority": None,
        "by_answer": [],
        "slices": slices(rows, marks, settings.slices, level, seed),
        "tests": dict.fromkeys(
            ("tuned_vs_base", "tuned_vs_majority", "tuned_vs_base_by_group", "tuned_vs_majority_by_group")
        ),
        "forgetting": None,
        "safety": None,
    }
    scores["tests"]["loss"] = say.loss_change([s.loss for s in base], [s.loss for s in tuned], level)
    if asked:
        right = [rows[i]["answer"] for i in asked]
        trained_answers = [a for a, choices in zip(train["answer"], train["choices"], strict=True) if choices]
        usual = say.majority_answer(trained_answers, right)
        by_base = [base[i].choice == rows[i]["answer"] for i in asked]
        by_tuned = [tuned[i].choice == rows[i]["answer"] for i in asked]
        by_usual = [answer == usual for answer in right]
        share, low, high = say.proportion(sum(by_usual), len(asked), level)
        scores["majority"] = {"answer": usual, "accuracy": share, "correct": sum(by_usual), "low": low, "high": high}
        of_group = [rows[i]["group"] for i in asked]
        for name, other in (("tuned_vs_base", by_base), ("tuned_vs_majority", by_usual)):
            scores["tests"][name] = say.mcnemar(by_tuned, other)
            scores["tests"][f"{name}_by_group"] = say.by_group(by_tuned, other, of_group)
        scores["by_answer"] = _by_answer(right, [base[i].choice for i in asked], [tuned[i].choice for i in asked])
    scores["gain"] = say.is_gain(scores)
    scores["verdict"] = say.verdict(scores)
    scores["gates"] = gates(scores, settings)
    return scores


def marks_of(
    rows: Sequence[Row],
    base: Sequence[RowScore],
    tuned: Sequence[RowScore],
    settings: Evaluate,
    answered: metric.Marks | None = None,
) -> metric.Marks | None:
    """The marks of the metric: those of answers where there are any, else of choices; None where neither is asked."""
    by_choice = settings.metric in ("auto", "accuracy") and any(row["choices"] for row in rows)
    return metric.by_choice(rows, base, tuned) if answered is None and by_choice else answered


def side_of(rows: Sequence[Row], scored: Sequence[RowScore], level: float, seed: int) -> dict[str, Any]:
    """One model on these rows: loss and perplexity with their intervals, and how many choices were right."""
    asked = [i for i, row in enumerate(rows) if row["choices"]]
    tokens = [len(s.logprobs) for s in scored]
    nats = [s.loss * count for s, count in zip(scored, tokens, strict=True)]
    side: dict[str, Any] = token_loss(nats, tokens, [row["group"] for row in rows], level, seed) | {
        "row_loss": sum(s.loss for s in scored) / len(scored),
        "tokens": sum(tokens),
        "accuracy": None,
        "correct": None,
        "low": None,
        "high": None,
        "ties": None,
    }
    if asked:
        correct = sum(scored[i].choice == rows[i]["answer"] for i in asked)
        share, low, high = say.proportion(correct, len(asked), level)
        side |= {"accuracy": share, "correct": correct, "low": low, "high": high}
        side["ties"] = sum(scored[i].tied for i in asked)
    return side


def _by_answer(right: Sequence[str], base: Sequence[Any], tuned: Sequence[Any]) -> list[dict[str, Any]]:
    """Per answer: how often it is right, is said, and is said rightly. Shows a model that says one thing only."""
    expected, said_base, said_tuned = Counter(right), Counter(base), Counter(tuned)
    hits_base = Counter(r for r, b in zip(right, base, strict=True) if r == b)
    hits_tuned = Counter(r for r, t in zip(right, tuned, strict=True) if r == t)
    names = sorted(expected | said_base | said_tuned, key=lambda a: (-expected[a], a))
    return [
        {
            "answer": a,
            "rows": expected[a],
            "base_said": said_base[a],
            "base_right": hits_base[a],
            "tuned_said": said_tuned[a],
            "tuned_right": hits_tuned[a],
        }
        for a in names
    ]
