"""Numbers and texts as a person reads them: the filters of the report's pages."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup, escape

DASH = "\u2013"
"""What stands where there is nothing to say."""
LONGEST_LIST = 200
"""More values than this are counted, not written out: a row per held-out row would hide the rest."""


def number(value: float | int | None, digits: int = 3) -> str:
    """A number for reading: thousands apart, three significant digits below 1000; a dash for None."""
    if value is None:
        return DASH
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.{digits}g}"


def percent(share: float | None) -> str:
    """A fraction of 1 in percent, one decimal; a dash for None."""
    return DASH if share is None else f"{100 * share:.1f}\u00a0%"


def points(change: float | None) -> str:
    """A change of a fraction in percentage points, with its sign; a dash for None."""
    return DASH if change is None else f"{100 * change:+.1f}\u00a0points".replace("-", "\u2212")


def signed(value: float | None, digits: int = 4) -> str:
    """A change with its sign; a dash for None."""
    return DASH if value is None else f"{value:+.{digits}f}".replace("-", "\u2212")


def span(seconds: float | None) -> str:
    """A time for reading, in the unit that fits it; a dash for None."""
    if seconds is None:
        return DASH
    if seconds < 1:
        return "under 1 s" if seconds else "0 s"
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g}\u00a0{unit}"
    return f"{seconds / 86_400:,.3g}\u00a0days"


def small(value: float | None, unit: str) -> str:
    """A quantity with its unit, `under 0.01` where it is nearly nothing; a dash for None."""
    if value is None:
        return DASH
    return f"under 0.01\u00a0{unit}" if 0 < value < 0.01 else f"{number(float(value))}\u00a0{unit}"


def size(count: int) -> str:
    """Bytes for reading."""
    if count < 1024:
        return f"{count} B"
    for power, unit in ((1, "KiB"), (2, "MiB"), (3, "GiB")):
        if count < 1024 ** (power + 1) or unit == "GiB":
            return f"{count / 1024**power:,.3g} {unit}" if unit != "GiB" else f"{count / 1024**power:,.1f} GiB"
    raise AssertionError(count)


def chance(p: float | None) -> str:
    """A p-value for reading; a dash for None."""
    if p is None:
        return DASH
    return f"{p:.2f}" if p >= 0.095 else f"{p:.1g}".replace("-", "\u2212")


def side(value: Any) -> float | None:
    """A figure that is a number, or that a dict holds; None where there is none."""
    if isinstance(value, Mapping):
        found = [value[key] for key in ("value", "accuracy", "mean", "change") if key in value]
        return side(found[0]) if found else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def share(value: Any) -> str:
    """A share with its interval where it has one: `63.3 % (57.1 to 69.2)`; a dash for None."""
    return percent(side(value)) + within(value)


def quantity(value: Any) -> str:
    """A figure with its interval: a share in percent, anything outside of 0 to 1 as a number."""
    known = side(value)
    if known is None or 0 <= known <= 1:
        return share(value)
    low, high = bounds(value)
    return number(known) + (f" ({number(low)} to {number(high)})" if low is not None else "")


def change(value: Any) -> str:
    """A change of a share with its interval, in percentage points; a dash for None."""
    low, high = bounds(value)
    told = points(side(value))
    return (
        told
        if low is None or high is None
        else f"{told} ({100 * low:+.1f} to {100 * high:+.1f})".replace("-", "\u2212")
    )


def within(value: Any) -> str:
    """The interval of a share as ` (57.1 to 69.2)`, or nothing."""
    low, high = bounds(value)
    return "" if low is None or high is None else f" ({100 * low:.1f} to {100 * high:.1f})"


def bounds(value: Any) -> tuple[float | None, float | None]:
    """(low, high) of a dict that has both, else (None, None)."""
    if not isinstance(value, Mapping) or "low" not in value or "high" not in value:
        return None, None
    return (value["low"], value["high"]) if None not in (value["low"], value["high"]) else (None, None)


def has(value: Any, key: str) -> Any:
    """What a dict holds under a key; None where it lacks it, or is no dict: files of other versions hold less."""
    return value[key] if isinstance(value, Mapping) and key in value else None


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every leaf of a JSON value, numbers as the file writes them. Long lists are counted."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from flat(part, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and len(value) > LONGEST_LIST:
        yield prefix, f"{len(value)} entries"
    elif isinstance(value, list) and value:
        for i, part in enumerate(value):
            yield from flat(part, f"{prefix}[{i}]")
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value)


def code(text: str) -> Markup:
    """A text whose `words in backticks` become code; everything is escaped."""
    parts = str(text).split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


FILTERS = {
    "number": number,
    "percent": percent,
    "points": points,
    "signed": signed,
    "span": span,
    "small": small,
    "size": size,
    "chance": chance,
    "share": share,
    "quantity": quantity,
    "change": change,
    "within": within,
    "has": has,
    "flat": lambda value: list(flat(value)),
    "code": code,
}
"""Name in a template -> function."""
