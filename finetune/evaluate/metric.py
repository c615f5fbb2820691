"""The domain's own measure: what makes an answer right, row by row, for base and tuned."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.evaluate.score import Row, RowScore
    from finetune.recipe import Evaluate

CUT = " …"
"""What `score.greedy` puts behind an answer that did not end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """The marks of both models on the same rows, from 0 (wrong) to 1 (right)."""

    name: str
    """The metric."""
    rows: list[int]
    """Places among the held-out rows."""
    base: list[float]
    """One per row."""
    tuned: list[float]
    """One per row."""
    cut: tuple[int, int] | None = None
    """How many generated answers of base and tuned did not end within evaluate.max_new_tokens; None without any."""


def by_choice(rows: Sequence[Row], base: Sequence[RowScore], tuned: Sequence[RowScore]) -> Marks:
    """Whether the likeliest choice is the expected one, on the rows that have choices."""
    asked = [i for i, row in enumerate(rows) if row["choices"]]
    old, new = ([float(scored[i].choice == rows[i]["answer"]) for i in asked] for scored in (base, tuned))
    return Marks(name="accuracy", rows=asked, base=old, tuned=new)


def by_answer(name: str, places: list[int], expected: list[str], base: list[str], tuned: list[str]) -> Marks:
    """Marks of generated answers by the metric `name`; an answer that was cut is marked as far as it goes:
    no metric sees its ellipsis.
    """
    mark = mark_of(name)
    marks = [[mark(e, a) for e, a in zip(expected, said, strict=True)] for said in (base, tuned)]
    cut = sum(a.endswith(CUT) for a in base), sum(a.endswith(CUT) for a in tuned)
    return Marks(name=name, rows=places, base=marks[0], tuned=marks[1], cut=cut)


def reads_answers(settings: Evaluate) -> bool:
    """Whether the metric is one of generated answers."""
    return settings.metric not in ("auto", "none", "accuracy")


def mark_of(name: str) -> Callable[[str, str], float]:
    """The metric: (expected, answer) -> mark."""
    return {"exact": exact, "number": number, "f1": f1, "rouge_l": rouge_l}[name]


def exact(expected: str, answer: str) -> float:
    """1 where both have the same words in the same order, whatever case, punctuation and spacing."""
    return float(_words(expected) == _words(answer))


def number(expected: str, answer: str) -> float:
    """1 where the last number of both is the same, to one part in a million; 0 where either has none."""
    right, said = _last_number(expected), _last_number(answer)
    return float(right is not None and said is not None and math.isclose(right, said, rel_tol=1e-6, abs_tol=1e-9))


def f1(expected: str, answer: str) -> float:
    """Harmonic mean of the shares of words in common, as in SQuAD (Rajpurkar et al. 2016), articles included."""
    right, said = _words(expected), _words(answer)
    common = sum((Counter(right) & Counter(said)).values())
    return 2 * common / (len(right) + len(said)) if right or said else 1.0


def rouge_l(expected: str, answer: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004), by the package rouge-score, without stemming.

    That package sees the letters a to z and digits only.
    """
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"]).score(expected, answer)["rougeL"].fmeasure)


def told(marks: Marks | None, confidence: float, seed: int) -> dict[str, Any] | None:
    """scores["metric"]: the mean mark of both sides, the change, intervals and a paired test; None without rows."""
    from finetune.evaluate.intervals import change_of, mean_of

    if marks is None or not marks.rows:
        return None
    sides = {}
    for i, (name, values) in enumerate((("base", marks.base), ("tuned", marks.tuned))):
        value, low, high = mean_of(values, confidence, seed)
        sides[name] = {"value": value, "low": low, "high": high, "cut": marks.cut[i] if marks.cut else None}
    return {"name": marks.name, "rows": len(marks.rows), **sides, **change_of(marks.base, marks.tuned, confidence)}


def _words(text: str) -> list[str]:
    return re.findall(r"[\w.]*\w", text.casefold())


def _last_number(text: str) -> float | None:
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d+)?|-?\.\d+", text)
    return float(found[-1].replace(",", "")) if found else None
