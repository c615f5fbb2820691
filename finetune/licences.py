"""What the licence of a base model asks of the tuned one. The rules are data: `licences.yaml` beside this file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Licence:
    """The duties of one licence, with where and when they were read. Information, not legal advice."""

    key: str
    """As model cards write it in `model.licence`."""
    title: str
    """Its full name."""
    commercial: str
    """Whether commercial use is allowed, in words."""
    duties: tuple[str, ...]
    """What whoever tunes or passes on the model must do, a sentence each."""
    source: str
    """Where the text can be read."""
    read: str
    """`in full` when the licence text was read, `summary` when a summary of it was."""
    date: str
    """When, as YYYY-MM-DD."""
    name_prefix: str = ""
    """How the name of a tuned model must begin; empty when the licence does not say."""


@cache
def licences() -> dict[str, Licence]:
    """Every licence we have rules for, by its key."""
    import yaml

    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {key: Licence(key=key, **{**row, "duties": tuple(row["duties"])}) for key, row in table.items()}


def find_licence(key: str) -> Licence | None:
    """The licence with this key, or None when there are no rules for it."""
    table = licences()
    return table[key] if key in table else None
