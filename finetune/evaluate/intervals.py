"""How sure a figure is: shares, losses, and what changed between base and tuned on the same rows. No torch here.

Everything is two-sided at the level `evaluate.confidence`, and what is drawn is drawn by the run's seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.evaluate.verdict import loss_change, mcnemar, proportion

DRAWS = 2000
"""Resamples of a bootstrap."""

GROUPS = 10
"""Fewer groups than this say nothing about the groups that were not seen; rows are drawn instead, and it is said."""

PAIRED = "Newcombe's hybrid score interval for paired shares (1998, method 10)"
MEANS = "Student's paired t interval"


def token_loss(
    nats: Sequence[float], tokens: Sequence[int], groups: Sequence[str], confidence: float, seed: int
) -> dict[str, Any]:
    """Loss per answer token over all rows, its perplexity (exp of it), and intervals of both by a bootstrap.

    `nats` is a row's summed loss, `tokens` its answer tokens. Whole groups are drawn, because rows of one resemble each
    other; rows where there are fewer than 10 groups. Ends are null with one row; a perplexity beyond floats is null.
    """
    sums, counts, unit = _units(nats, tokens, groups)
    loss = float(sums.sum() / counts.sum())
    low, high = _percentiles((sums, counts), lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis), confidence, seed)
    told = {"loss": loss, "loss_low": low, "loss_high": high, "perplexity": _exp(loss)}
    told |= {"perplexity_low": _exp(low), "perplexity_high": _exp(high)}
    return told | {"interval": f"bootstrap, percentiles of {DRAWS} draws of {len(sums)} {unit}, seed {seed}"}


def mean_of(marks: Sequence[float], confidence: float, seed: int) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of marks from 0 to 1: Wilson's interval of a share, a bootstrap over rows of other marks."""
    if _are_shares(marks):
        return proportion(round(sum(marks)), len(marks), confidence)
    values = np.asarray(marks, dtype=np.float64)
    return float(values.mean()), *_percentiles((values,), lambda v, axis: v.mean(axis=axis), confidence, seed)


def change_of(base: Sequence[float], tuned: Sequence[float], confidence: float) -> dict[str, Any]:
    """Mean change (tuned - base) of the same rows' marks, its interval and a paired test, each with its name.

    Marks of 0 and 1 get Newcombe's interval and McNemar's test; others Student's. `wins` are rows that tuned is better
    on, `losses` those it is worse on.
    """
    if _are_shares([*base, *tuned]):
        ours, theirs = [mark == 1 for mark in tuned], [mark == 1 for mark in base]
        change, low, high = paired_shares(ours, theirs, confidence)
        told = {"change": change, "low": low, "high": high, "interval": PAIRED, "test": mcnemar(ours, theirs)}
        return told
    found = loss_change(base, tuned, confidence)
    wins = sum(new > old for old, new in zip(base, tuned, strict=True))
    losses = sum(new < old for old, new in zip(base, tuned, strict=True))
    test = {"test": found["test"], "wins": wins, "losses": losses, "p": 1.0 if found["p"] is None else found["p"]}
    return {"change": found["mean"], "low": found["low"], "high": found["high"], "interval": MEANS, "test": test}


def token_loss_change(
    base: Sequence[float],
    tuned: Sequence[float],
    tokens: Sequence[int],
    groups: Sequence[str],
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Change (tuned - base) of the loss per answer token over the same rows, its interval and a paired test.

    `base` and `tuned` are the rows' summed losses. What `token_loss` draws (groups, or rows) is drawn for the interval,
    and is what the paired t of the test counts once. `low`, `high` and `p` are null where there is too little of it.
    """
    old, counts, unit = _units(base, tokens, groups)
    new, _, _ = _units(tuned, tokens, groups)
    low, high = _percentiles(
        (new - old, counts), lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis), confidence, seed
    )
    found = loss_change((old / counts).tolist(), (new / counts).tolist(), confidence)
    wins, losses = int((new < old).sum()), int((new > old).sum())  # a lower loss is better
    return {
        "change": float((new - old).sum() / counts.sum()),
        "low": low,
        "high": high,
        "interval": f"bootstrap, percentiles of {DRAWS} draws of {len(old)} {unit}, seed {seed}",
        "test": {"test": f"paired t, over {len(old)} {unit}", "wins": wins, "losses": losses, "p": found["p"]},
    }


def holm(values: Sequence[float]) -> list[float]:
    """The p-values of several tests, each raised so that a small one is no chance find among all (Holm 1979)."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted, least = [1.0] * len(values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = least
    return adjusted


def paired_shares(ours: Sequence[bool], theirs: Sequence[bool], confidence: float) -> tuple[float, float, float]:
    """(difference, low, high) of two shares of the same rows: Newcombe (1998), Stat. Med. 17:2635, method 10.

    Wilson's interval of each share, joined by their correlation. It does not collapse where both agree on every row.
    """
    n = len(ours)
    both = sum(a and b for a, b in zip(ours, theirs, strict=True))
    first, second = sum(ours), sum(theirs)
    p, low_p, high_p = proportion(first, n, confidence)
    q, low_q, high_q = proportion(second, n, confidence)
    spread = first * second * (n - first) * (n - second)
    surplus: float = both * (n - first - second + both) - (first - both) * (second - both)
    surplus = max(surplus - n / 2, 0.0) if surplus > 0 else surplus
    phi = surplus / math.sqrt(spread) if spread else 0.0

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))

    return p - q, p - q - reach(p - low_p, high_q - q), p - q + reach(high_p - p, q - low_q)


def _are_shares(marks: Sequence[float]) -> bool:
    return all(mark in (0, 1) for mark in marks)


def _units(nats: Sequence[float], tokens: Sequence[int], groups: Sequence[str]) -> tuple[Any, Any, str]:
    """Losses and tokens summed over what is drawn, and its name."""
    names, places = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    sums, counts = np.asarray(nats, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if len(names) == len(sums) or len(names) < GROUPS:
        return sums, counts, "rows" if len(names) == len(sums) else f"rows (too few groups to draw: {len(names)})"
    return np.bincount(places, sums), np.bincount(places, counts), "groups"


def _percentiles(
    data: tuple[Any, ...], statistic: Any, confidence: float, seed: int
) -> tuple[float | None, float | None]:
    """Ends of a percentile bootstrap; None where one unit leaves nothing to draw."""
    from scipy.stats import bootstrap

    if len(data[0]) < 2:
        return None, None
    found = bootstrap(
        data,
        statistic,
        paired=len(data) > 1,
        vectorized=True,
        n_resamples=DRAWS,
        batch=max(1, 10**7 // len(data[0])),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _exp(nats: float | None) -> float | None:
    return None if nats is None or nats > 700 else math.exp(nats)
