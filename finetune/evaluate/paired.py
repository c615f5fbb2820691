"""Two models on the same rows of a task: values with intervals, their difference, a paired test. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.evaluate import verdict as say
from finetune.evaluate.intervals import paired_shares


def paired(base: Sequence[float], tuned: Sequence[float], confidence: float) -> dict[str, Any]:
    """`base` and `tuned` (value, low, high), their `difference` (mean, low, high), a `test`, and the intervals' names.

    Rows that are right or wrong: Wilson's intervals, Newcombe's for the difference, McNemar's exact test. Other values:
    Student's intervals of the means and of the paired differences. Bounds are null where rows or spread are too few.
    """
    if set(base) | set(tuned) <= {0, 1}:
        ours, theirs = [v == 1 for v in tuned], [v == 1 for v in base]
        change, low, high = paired_shares(ours, theirs, confidence)
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


def _share(right: Sequence[bool], confidence: float) -> dict[str, Any]:
    value, low, high = say.proportion(sum(right), len(right), confidence)
    return {"value": value, "low": low, "high": high}


def _mean(values: Sequence[float], confidence: float) -> dict[str, Any]:
    told = say.loss_change(np.zeros(len(values)).tolist(), values, confidence)
    return {"value": told["mean"], "low": told["low"], "high": told["high"]}
