"""What the licences of a base and of rows forbid, by the settings: `verdicts(...)`, `problems(recipe)`. No network.

A rule is passed, broken, or open: then a setting would decide it, or nothing here can. Information, not legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.families import FAMILIES
from finetune.licences import Licence, find_licence, licences, recognise, standard_text
from finetune.recipe import Recipe
from finetune.rundir import sha256_file

EU = frozenset((
    "AT", "BE", "BG", "CY", "CZ", "DE", "DK", "EE", "ES", "FI", "FR", "GR", "HR", "HU",
    "IE", "IT", "LT", "LU", "LV", "MT", "NL", "PL", "PT", "RO", "SE", "SI", "SK",
))  # fmt: skip
"""Member states of the European Union on 2026-11-25, as ISO 3166 writes them."""
NON_COMMERCIAL = re.compile(r"\bNC\b|non-?commercial|research[ -]only", re.IGNORECASE)
"""Names of licences, of rows, that exclude commercial use."""
TEXTS = ("LICENSE*", "LICENCE*", "COPYING*")
"""Files beside weights that hold a licence text."""
OTHERWISE = "If these weights are under another licence, put its text as LICENSE beside them: model.source=THAT_FOLDER."
"""What to type where the rules are those of the family's best-known release, and the recipe names another licence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """The licence text beside a base's weights."""

    file: str
    """Its name."""
    sha256: str
    """Its hash."""
    words: str
    """The text itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What one rule says about a recipe."""

    rule: str
    """Its id, as in errors."""
    passed: bool | None
    """Whether it is kept; None where nothing decides it yet."""
    what: str
    """The finding, in words."""
    source: str
    """Where the rule stands, and when it was read."""
    fix: str = ""
    """What to type, unless it is passed."""

    def sentence(self) -> str:
        """The finding as an error or a note."""
        return " ".join(f"{self.rule} {self.what} ({self.source}). {self.fix}".split())


def verdicts(
    recipe: Recipe, *, text: Text | None = None, accepted: Sequence[str] = (), rows: str = ""
) -> list[Verdict]:
    """Every rule that applies, for the base at full scale. `text` is what lies beside the weights, if it is at hand.

    `accepted` are hashes of texts that the user has accepted, `rows` the licence of the rows. Random weights of a
    rehearsal are under no licence: see `applies`.
    """
    found = _of_bases(recipe, bound_by(recipe, text))
    return [*found, *_of_text(recipe, text, {recipe.licence.accept, *accepted} - {""}), *_of_rows(recipe, rows)]


def carried(recipe: Recipe, text: Text | None) -> Verdict:
    """Whether an export carries the text of the base's licence: the one beside the weights, or one that comes with us.

    Without it the rule is open, not broken: an export may be used by who made it.
    """
    named = _named(recipe)
    here = text is not None or bool(standard_text(key_of(recipe)))
    where = recipe.model.licence_url or (named.source if named else "see where the base is published")
    return Verdict(
        rule="LIC-009",
        passed=here or None,
        what=f"the export {'carries' if here else 'lacks'} the text of the base's licence",
        source=_source(named) if named else f"model.licence={key_of(recipe) or '(empty)'}",
        fix="" if here else f"Put it as LICENSE beside the weights, or into the export before you pass it on: {where}",
    )


def problems(recipe: Recipe) -> Iterator[str]:
    """A sentence for every rule that the settings break, before anything is at hand."""
    said = recipe.licence
    if said.established_in and not re.fullmatch(r"[A-Z]{2}", said.established_in):
        yield f"LIC-008 licence.established_in={said.established_in} is no code of two letters. Write US, DE or so."
    if said.accept and not re.fullmatch(r"[0-9a-f]{64}", said.accept):
        yield f"LIC-008 licence.accept={said.accept} must be the 64 hex digits of the text. Type: sha256sum FILE"
    if said.of_rows and not recipe.data.train_files:
        yield "LIC-008 licence.of_rows has no effect with a data card, which says it itself. Leave it out."
    if applies(recipe):
        yield from (verdict.sentence() for verdict in by_settings(recipe) if verdict.passed is False)


def open_questions(recipe: Recipe) -> list[str]:
    """A sentence for every rule that a setting would decide and none has."""
    return [v.sentence() for v in by_settings(recipe) if v.passed is None] if applies(recipe) else []


def by_settings(recipe: Recipe) -> list[Verdict]:
    """The rules that need nothing but the settings."""
    text = text_at_hand(recipe)
    family = None if text and recognise(text.words) else _strict_family(recipe)  # the text's own rules: `permits`
    return [*_of_bases(recipe, _known(_named(recipe), family)), *_of_rows(recipe, recipe.licence.of_rows)]


def applies(recipe: Recipe) -> bool:
    """Whether the licence of the base binds this run: not the random weights of a rehearsal, which are made here."""
    return not recipe.model.tiny


def key_of(recipe: Recipe) -> str:
    """The licence key of the base: its card's, else that of the family's best-known release."""
    family = recipe.model.family
    return recipe.model.licence or (FAMILIES[family].licence if family in FAMILIES else "")


def bound_by(recipe: Recipe, text: Text | None) -> list[Licence]:
    """The licences whose rules are checked: the one that the recipe names, and the one that the text is.

    Where the text is none that is known, also that of the family's best-known release, if it prescribes names or
    excludes the European Union: a word in a recipe does not change under which licence weights are.
    """
    is_one = recognise(text.words) if text else None
    return _known(_named(recipe), is_one, None if is_one else _strict_family(recipe))


def text_at_hand(recipe: Recipe) -> Text | None:
    """The licence text beside the weights when `model.source` is a folder that has one, or None."""
    folder = Path(recipe.model.source).expanduser()
    return licence_text(folder) if recipe.model.source and folder.is_dir() else None


def licence_text(base: Path) -> Text | None:
    """The licence text beside a base's weights, or None. Of several that of the model, not of its code."""

    def rank(path: Path) -> tuple[bool, bool, str]:
        return "MODEL" not in path.name.upper(), "CODE" in path.name.upper(), path.name

    found = sorted({p for pattern in TEXTS for p in base.glob(pattern) if p.is_file()}, key=rank)
    if not found:
        return None
    words = found[0].read_bytes().decode("utf-8", errors="replace")
    return Text(file=found[0].name, sha256=sha256_file(found[0]), words=words)


def _named(recipe: Recipe) -> Licence | None:
    return find_licence(key_of(recipe))


def _strict_family(recipe: Recipe) -> Licence | None:
    """The licence of the family's best-known release where it prescribes names or excludes somebody, or None."""
    key = FAMILIES[recipe.model.family].licence if recipe.model.family in FAMILIES else ""
    licence = find_licence(key)
    return licence if licence and (licence.name_prefix or licence.eu_excluded) else None


def _known(*either: Licence | None) -> list[Licence]:
    return list({licence.key: licence for licence in either if licence}.values())


def _of_bases(recipe: Recipe, bound: Sequence[Licence]) -> list[Verdict]:
    """What each of the licences says, and what to do if it is the family's and not that of these weights."""
    found = []
    for licence in bound:
        doubted = licence == _strict_family(recipe) and licence != _named(recipe)
        for verdict in _of_base(recipe, licence):
            found.append(replace(verdict, fix=f"{verdict.fix} {OTHERWISE}") if doubted else verdict)
    return found


def _of_base(recipe: Recipe, licence: Licence) -> Iterator[Verdict]:
    said, source = recipe.licence, _source(licence)
    name = recipe.export.name or recipe.name
    if prefix := licence.name_prefix:
        yield Verdict(
            rule="LIC-001",
            passed=name.startswith(prefix),
            what=f'export.name={name} must begin with "{prefix}"',
            source=source,
            fix=f"Set export.name={prefix}-{name}.",
        )
    if licence.non_commercial:
        yield Verdict(
            rule="LIC-003",
            passed=said.use in ("research", "personal"),
            what=f"licence.use={said.use}: commercial use of this base is not allowed",
            source=source,
            fix="Choose another base with model=NAME, or say what it is for: licence.use=research.",
        )
    if licence.eu_excluded:
        here = said.established_in
        yield Verdict(
            rule="LIC-004",
            passed=here not in EU | {"EU"} if here else None,
            what=f"licence.established_in={here or '(not said)'}: {licence.eu_excluded}",
            source=f"{licence.title}, {licence.eu_source}, read {licence.date}",
            fix="Choose another base with model=NAME."
            if here
            else "Say where you are: licence.established_in=US, DE ...",
        )
    if most := licence.most_monthly_users:
        users = said.monthly_users
        what = f"licence.monthly_users={users or '(not said)'}: above {most:,} users there are no rights"
        another = "Ask the licensor, or choose another base with model=NAME."
        yield Verdict(
            rule="LIC-006",
            passed=users <= most if users else None,
            what=f"{what} without a licence of your own; they count {licence.users_counted}",
            source=source,
            fix=another if users else "Say how many you have: licence.monthly_users=NUMBER.",
        )


def _of_text(recipe: Recipe, text: Text | None, accepted: set[str]) -> Iterator[Verdict]:
    """Whether the rules of the text beside the weights are known here, or it was accepted as it is."""
    key, is_one = key_of(recipe), recognise(text.words) if text else None
    named = find_licence(key)
    agreed = text is not None and text.sha256 in accepted
    if text and is_one and named and is_one.key != named.key:
        what = f"model.licence={key}, but {text.file} beside the weights is the {is_one.title}"
        fix = f"Set model.licence={is_one.key}."
        yield Verdict(rule="LIC-002", passed=agreed, what=what, source=_source(is_one), fix=fix)
        return
    known = is_one or (named if named and not text and named.read == "in full" else None)
    if known:
        what = "the text of the base's licence is known here"
        yield Verdict(rule="LIC-007", passed=True, what=what, source=_source(known))
        return
    fix = "put the licence text as LICENSE beside the weights, then licence.accept=SHA256 of it"
    if text:
        what = f"the text of {text.file} beside the weights is not known here"
        fix = f"read it, then licence.accept={text.sha256}"
    elif named:
        what = f"of the {named.title} only a summary was read here, and its text is not beside the weights"
    else:
        what = f"model.licence={recipe.model.licence or '(empty)'}: nothing is known of this licence"
    yield Verdict(
        rule="LIC-007",
        passed=agreed,
        what=f"{what}: training is allowed, an export only when you accept it",
        source=_source(named) if named else "there are rules for " + ", ".join(licences()),
        fix=f"To export, {fix}; to stop before that, python -m finetune evaluate ...",
    )


def _of_rows(recipe: Recipe, rows: str) -> Iterator[Verdict]:
    licence = recipe.licence.of_rows or rows
    if NON_COMMERCIAL.search(licence):
        yield Verdict(
            rule="LIC-005",
            passed=recipe.licence.use in ("research", "personal"),
            what=f"licence.use={recipe.licence.use}: the rows are under {licence}, which excludes commercial use",
            source=f"data card {recipe.data.card}" if recipe.data.card else "licence.of_rows",
            fix="Choose other rows with data=NAME, or say what the model is for: licence.use=research.",
        )


def _source(licence: Licence) -> str:
    return f"{licence.title}, {licence.source}, read {licence.date}"
