"""JSON texts as values, unless nested so deeply that whatever walks through them would fail; and what is in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

DEPTH = 100
"""Lists and objects inside each other, at most. No format of rows or settings needs a tenth of it."""


def parsed(text: str, **hooks: Any) -> Any:
    """The value of a JSON text; `hooks` are those of json.loads. Raises ValueError, also for one that is too deep."""
    try:
        value = json.loads(text, **hooks)
    except RecursionError:
        raise ValueError(f"nested more than {DEPTH} deep") from None
    if text.count("[") + text.count("{") > DEPTH and too_deep(value):
        raise ValueError(f"nested more than {DEPTH} deep")
    return value


def too_deep(value: Any) -> bool:
    """Whether lists and dicts lie inside each other more than DEPTH deep. Needs no stack of its own."""
    level = [value]
    for _ in range(DEPTH + 1):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def leaves(value: Any) -> Iterator[Any]:
    """Every text, number and null in a value, the names in its objects among them."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def without_nulls(value: Any) -> Any:
    """The value without the empty fields that Arrow adds to objects, to make all rows alike."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
