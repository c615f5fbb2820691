"""JSON texts as values, unless nested so deeply that whatever walks through them would fail; and what is in them."""

from __future__ import annotations

import json
from collections import Counter
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


def checked(text: str, at: str, ends: str = "") -> tuple[Any, str]:
    """(the value of a JSON text, its fault): a key that stands twice in an object, NaN, or no JSON, then with None.

    The fault names the place `at`, or is empty; `ends` is added to it where it is no JSON.
    """
    twice: list[str] = []
    odd: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) < len(items):
            twice.extend(name for name, count in Counter(name for name, _ in items).items() if count > 1)
        return made

    try:
        value = parsed(text, object_pairs_hook=pairs, parse_constant=odd.append)
    except json.JSONDecodeError as error:
        return None, f"DATA-022 {at} is not JSON: {error.msg} at character {error.pos + 1}{ends}"
    except ValueError:
        return None, f"DATA-022 {at} is not JSON that can be read: nested too deeply, or a number too long"
    if twice:
        return value, f"DATA-023 {at} has the key {twice[0]!r} twice in one object"
    return value, f"DATA-022 {at} has {odd[0]}, which is not JSON" if odd else ""


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
