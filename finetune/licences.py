"""What the licence of a base model asks of the tuned one. The rules are data: `licences.yaml` beside this file."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Licence:
    """The rules of one licence, with where and when they were read. Information, not legal advice."""

    key: str
    """As model cards write it in `model.licence`."""
    title: str
    """Its full name."""
    commercial: str
    """Whether commercial use is allowed, in words."""
    non_commercial: bool = False
    """Commercial use is not allowed, or not without written consent."""
    duties: tuple[str, ...]
    """What whoever tunes or passes on the model must do, a sentence each."""
    source: str
    """Where the text can be read."""
    read: str
    """`in full` when the licence text was read, `summary` when a summary of it was."""
    date: str
    """When, as YYYY-MM-DD."""
    hub: str = "other"
    """Its name among the licence names that model hubs know; `other` where they have none."""
    spdx: str = ""
    """Its SPDX identifier, if it has one."""
    name_prefix: str = ""
    """How the name of a tuned model must begin; empty when the licence does not say."""
    display: str = ""
    """The words to show where the model is offered."""
    notice: str = ""
    """The line that a Notice file must hold."""
    most_monthly_users: int = 0
    """Above so many monthly users the licence gives no rights; 0 when it sets no limit."""
    users_counted: str = ""
    """Which users count, and when."""
    use_policy: str = ""
    """Where its rules of acceptable use can be read."""
    eu_excluded: str = ""
    """Who in the European Union gets no rights, in words; empty when it excludes nobody."""
    eu_source: str = ""
    """Where that stands."""
    covers_outputs: bool = False
    """Its duties reach models that are trained on what this one writes."""
    state_changes: bool = False
    """Changed files must say that they were changed."""
    holds: tuple[str, ...] = ()
    """Phrases that only its text holds together, whatever spaces, case and quotation marks."""
    text_sha256: str = ""
    """Hash of the text between the first and the last of `holds`, as `normalised` writes it; empty: not compared."""
    ends_there: bool = False
    """Nothing follows the last of `holds`: what does makes it another licence."""

    def is_of(self, text: str) -> bool:
        """Whether a text is this licence's, as far as we know it."""
        words = normalised(text)
        if not self.holds or not all(normalised(phrase) in words for phrase in self.holds):
            return False
        if not self.text_sha256:
            return True
        first, last = normalised(self.holds[0]), normalised(self.holds[-1])
        end = words.rindex(last) + len(last)
        if self.ends_there and words[end:]:
            return False
        body = words[words.index(first) : end]
        return hashlib.sha256(body.encode()).hexdigest() == self.text_sha256


@cache
def licences() -> dict[str, Licence]:
    """Every licence we have rules for, by its key."""
    import yaml

    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    lists = ("duties", "holds")
    return {
        key: Licence(key=key, **(row | {name: tuple(row[name]) for name in lists if name in row}))
        for key, row in table.items()
    }


def find_licence(key: str) -> Licence | None:
    """The licence with this key, or None when there are no rules for it."""
    table = licences()
    return table[key] if key in table else None


def recognise(text: str) -> Licence | None:
    """The licence that a text is, or None when it is none we know. The longest description wins."""
    found = [licence for licence in licences().values() if licence.is_of(text)]
    return max(found, key=lambda licence: sum(map(len, licence.holds)), default=None)


def standard_text(key: str) -> str:
    """The text of a licence that is the same for everybody and comes with us; empty where there is none."""
    path = Path(__file__).with_name("licence_texts") / f"{key}.txt"
    return path.read_text(encoding="utf-8") if re.fullmatch(r"[\w.-]+", key) and path.is_file() else ""


def normalised(text: str) -> str:
    """A text in small letters, with one space between words and straight quotation marks."""
    straight = text.translate({0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'"})
    return " ".join(straight.lower().split())
