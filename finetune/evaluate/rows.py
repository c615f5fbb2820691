"""scores_rows.jsonl: what base and tuned made of each held-out row, so that runs can be tested against each other.

A line has `row` and `input`, hashes of what was asked in words and in tokens; `group`, a number that rows of one group
share within this file; `tokens` of the answer; and for `base` and `tuned` each `loss` in nats per token, `right`
(whether the likeliest choice is the expected one; null without choices) and `mark` (the metric of scores.json, from 0
to 1; null where this row was not marked). Hashes name rows that one has: the file holds no words of them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.rundir import write_text

if TYPE_CHECKING:
    from finetune.evaluate.metric import Marks
    from finetune.evaluate.score import Row, RowScore

LONGEST, LARGEST = 2**31, 1e9
"""Most tokens of an answer, and largest loss, that a file is believed: whoever makes a false one can write anything."""


def lines_of(
    rows: Sequence[Row], base: Sequence[RowScore], tuned: Sequence[RowScore], marks: Marks | None
) -> list[dict[str, Any]]:
    """A line per row, in the order of `rows`; rows that ask the same twice have hashes of their own."""
    marked = {place: i for i, place in enumerate(marks.rows)} if marks else {}
    groups: dict[Any, int] = {}
    seen: Counter[str] = Counter()
    found = []
    for place, row in enumerate(rows):
        words = _words(row)
        seen[words] += 1
        line: dict[str, Any] = {
            "row": _hash([words, seen[words]]),
            "input": _hash([list(row["input_ids"]), list(row["labels"])]),
            "group": groups.setdefault(row["group"], len(groups)),
            "tokens": len(base[place].logprobs),
        }
        for name, scored in (("base", base[place]), ("tuned", tuned[place])):
            right = scored.choice == row["answer"] if row["choices"] else None
            mark = getattr(marks, name)[marked[place]] if place in marked else None
            line[name] = {"loss": scored.loss, "right": right, "mark": mark}
        found.append(line)
    return found


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Writes the lines in one step. Raises ValueError for a number that is not finite."""
    write_text(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, as `lines_of` made them. Raises ValueError where they are not of that form."""
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line in found:
            hashes = [isinstance(line[name], str) for name in ("row", "input")]
            counts = [type(line[name]) is int for name in ("group", "tokens")]
            sides = [_is_side(line[side]) for side in ("base", "tuned")]
            if not all((*hashes, *counts, *sides)) or not 1 <= line["tokens"] <= LONGEST:
                raise TypeError
    except (KeyError, TypeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError(f"{path} does not hold results row by row") from None
    return found


def _is_side(side: dict[str, Any]) -> bool:
    numbers = [value for value in (side["loss"], side["mark"]) if value is not None]
    fit = all(type(value) in (int, float) and abs(value) <= LARGEST for value in numbers)  # NaN is not
    return fit and side["loss"] is not None and side["right"] in (True, False, None)


def _words(row: Row) -> str:
    """What a row asks and expects, whatever the tokenizer; its tokens where it came as tokens."""
    asked = _bare(list(row["messages"] or [])) or [list(row["input_ids"]), list(row["labels"])]
    return json.dumps([asked, list(row["choices"] or [])], sort_keys=True)


def _bare(value: Any) -> Any:
    """A JSON value without keys that hold nothing: Arrow gives every message the keys of all."""
    if isinstance(value, dict):
        return {key: _bare(part) for key, part in value.items() if part is not None}
    return [_bare(part) for part in value] if isinstance(value, list) else value


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
