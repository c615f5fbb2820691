"""Two models on the same rows of a task: values with intervals, their difference, a paired test. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.evaluate import verdict as say


def paired(base: Sequence[float], tuned: Sequence[float], confidence: float) -> dict[str, Any]:
    """`base` and `tuned` (value, low, high), their `difference` (mean, low, high), a `test`, and the intervals' names.

    Rows that are right or wrong: Wilson's intervals, Newcombe's for the difference, McNemar's exact test. Other values:
    Student's intervals of the means and of the paired differences. Bounds are null where rows or spread are too few.
    """
    if set(base) | set(tuned) <= {0, 1}:
        ours, theirs = [v == 1 for v in tuned], [v == 1 for v in base]
        low, high = newcombe(theirs, ours, confidence)
        change = (sum(ours) - sum(theirs)) / len(ours)
        return {
            "base": _share(theirs, confidence),
            "tuned": _share(ours, confidence),
            "difference": {"mean": change, "low": low, "high": high},
            "test": say.mcnemar(ours, theirs),
            "interval": "Wilson; of the difference Newcombe's for paired shares",
        }
    test = say.loss_change(base, tuned, confidence)
    return {
        "base": _mean(base, confidence),
        "tuned": _mean(tuned, confidence),
        "difference": {key: test[key] for key in ("mean", "low", "high")},
        "test": {"test": test["test"], "p": test["p"]},
        "interval": "Student's t; of the difference paired",
    }


def newcombe(base: Sequence[bool], tuned: Sequence[bool], confidence: float) -> tuple[float, float]:
    """Bounds of the difference of two shares of the same rows (Newcombe 1998, Statist. Med. 17:2635, method 10).

    Made of both shares' Wilson intervals and the correlation phi of the two, with the continuity correction of phi.
    """
    rows = len(base)
    both = sum(a and b for a, b in zip(base, tuned, strict=True))
    only_base, only_tuned = sum(base) - both, sum(tuned) - both
    neither = rows - both - only_base - only_tuned
    p, p_low, p_high = say.proportion(sum(tuned), rows, confidence)
    q, q_low, q_high = say.proportion(sum(base), rows, confidence)
    spread = math.sqrt(sum(tuned) * (rows - sum(tuned)) * sum(base) * (rows - sum(base)))
    product = float(both * neither - only_base * only_tuned)
    if product > 0:
        product = max(product - rows / 2, 0.0)
    phi = product / spread if spread else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    return p - q - reach(p - p_low, q_high - q), p - q + reach(p_high - p, q - q_low)


def _share(right: Sequence[bool], confidence: float) -> dict[str, Any]:
    value, low, high = say.proportion(sum(right), len(right), confidence)
    return {"value": value, "low": low, "high": high}


def _mean(values: Sequence[float], confidence: float) -> dict[str, Any]:
    told = say.loss_change(np.zeros(len(values)).tolist(), values, confidence)
    return {"value": told["mean"], "low": told["low"], "high": told["high"]}
