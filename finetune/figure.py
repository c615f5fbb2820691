"""A number of a plan that says where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Basis = Literal["given", "assumed", "computed", "measured"]
"""In the recipe, its model card or a file; on an assumption; by arithmetic from given numbers; on a machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One number of a plan."""

    name: str
    """What it is."""
    value: float
    """The number."""
    unit: str
    """Its unit; empty for plain counts."""
    basis: Basis
    """Where it comes from."""
    how: str
    """Its source: the arithmetic, the assumption, the file, or what was measured where."""


def computed(name: str, value: float, unit: str, how: str) -> Figure:
    """A figure by arithmetic from given numbers."""
    return Figure(name=name, value=value, unit=unit, basis="computed", how=how)


def assumed(name: str, value: float, unit: str, how: str) -> Figure:
    """A figure that rests on an assumption."""
    return Figure(name=name, value=value, unit=unit, basis="assumed", how=how)


def given(name: str, value: float, unit: str, how: str) -> Figure:
    """A figure that somebody stated or that was counted in files."""
    return Figure(name=name, value=value, unit=unit, basis="given", how=how)


def measured(name: str, value: float, unit: str, how: str) -> Figure:
    """A figure that a machine showed."""
    return Figure(name=name, value=value, unit=unit, basis="measured", how=how)
