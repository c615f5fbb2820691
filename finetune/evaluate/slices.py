"""The metric in parts: by answer, group, length of the prompt or turns, so that a mean hides no loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from finetune.evaluate.metric import Marks
    from finetune.evaluate.score import Row

SMALL = 10
"""Slices of fewer rows than this are one, `other`: they would say nothing apart."""

OTHER = "other"


def slices(
    rows: Sequence[Row], marks: Marks | None, wanted: Sequence[str], confidence: float, seed: int
) -> list[dict[str, Any]]:
    """scores["slices"]: one entry per slice, largest first, `other` last; each with its own interval and paired test.

    What all rows share, and what tells nearly every row apart, has no table. The p-values stand alone: of twenty slices
    one is below 0.05 by chance.
    """
    from finetune.evaluate.intervals import change_of, mean_of

    found = []
    for by in wanted if marks else ():
        assert marks is not None
        values = _values([rows[i] for i in marks.rows], by)
        members: dict[str, list[int]] = {}
        sizes = Counter(values)
        for place, value in enumerate(values):
            members.setdefault(value if sizes[value] >= SMALL else OTHER, []).append(place)
        if len(members) < 2:
            continue
        for value in sorted(members, key=lambda v: (v == OTHER, -len(members[v]), v)):
            base, tuned = ([side[i] for i in members[value]] for side in (marks.base, marks.tuned))
            entry: dict[str, Any] = {"by": by, "value": value, "rows": len(base)}
            for name, side in (("base", base), ("tuned", tuned)):
                entry[name] = dict(zip(("accuracy", "low", "high"), mean_of(side, confidence, seed), strict=True))
            found.append(entry | change_of(base, tuned, confidence))
    return found


def _values(rows: Sequence[Row], by: str) -> list[str]:
    if by == "length":
        lengths = [int(row["prompt_length"]) for row in rows]
        ends = sorted({int(end) for end in np.quantile(lengths, (0.25, 0.5, 0.75, 1.0), method="lower")})
        starts = [1, *(end + 1 for end in ends)]
        return [next(f"{s} to {e} tokens" for s, e in zip(starts, ends, strict=False) if n <= e) for n in lengths]
    if by == "turns":
        return [str(sum(message["role"] == "user" for message in row["messages"])) for row in rows]
    return [str(row[by]) for row in rows]
