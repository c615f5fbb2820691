"""A setting whose value is one of a few: `one_of`."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def one_of(*choices: str) -> Any:
    """A text setting whose value must be one of `choices`; the first is the default. `check` refuses others."""
    return field(default=choices[0], metadata={"choices": choices})
