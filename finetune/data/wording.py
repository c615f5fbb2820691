"""The rows of a data card: fetched, filtered, worded as conversations by its templates, and split as it says."""

from __future__ import annotations

import dataclasses
import fnmatch
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.card import Card, read_card, refuse_training
from finetune.data.excerpt import excerpts
from finetune.data.files import inside
from finetune.data.readers import Beside, read_package
from finetune.data.rows import Row, quoted, read_messages
from finetune.data.split import in_order, limit, split_card, split_fraction
from finetune.errors import DataError
from finetune.recipe import Recipe
from finetune.rundir import sha256_file

SPLITS = ("train", "heldout")


@dataclass(slots=True, kw_only=True)
class Gathered:
    """The rows of a card with their splits, and where they are from."""

    rows: list[Row]
    """Every row that came in, kept or dropped."""
    source: dict[str, Any]
    """Title, licence, attribution and hashes of the files, as report.json shows them."""


def from_card(recipe: Recipe) -> Gathered:
    """The rows of a card: its sample rows, or those of its package, filtered, worded, split and put in order.

    Raises DataError for a card that cannot be trained on, FetchError for a package that is not at hand.
    """
    data, card = recipe.data, read_card(recipe.data.card)
    source = about(card, data.sample)
    if data.sample:
        rows = read_messages(inside(card.folder / card.sample, card.folder))
        for row in rows:
            row.file = card.sample
        split_fraction(rows, 1 / 3)
    else:
        wheel = wheel_of(card, recipe)
        print(f"reading {card.title} from {wheel.name}", file=sys.stderr, flush=True)
        rows, source["passed_over"] = read_package(card, wheel)
        word(rows, card, data.excerpt_words or card.excerpt_words)
        split_card(rows, card)
    for split, most in zip(SPLITS, (data.train_rows, data.heldout_rows), strict=True):
        limit(rows, split, most)
        for place, row in enumerate(in_order(rows, split)):
            row.place = place
    return Gathered(rows=rows, source=source)


def wheel_of(card: Card, recipe: Recipe) -> Path:
    """Where a card's files are: its package in the cache, fetched if need be, else the card's own folder."""
    from finetune.fetch import cache_folder, fetch_package

    if not card.package:
        return card.folder
    return fetch_package(
        card.package,
        card.version,
        card.sha256,
        cache=cache_folder(recipe),
        network=recipe.network,
        size_mb=card.size_mb,
        licence=card.licence,
    )


def about(card: Card, sample: bool) -> dict[str, Any]:
    """Where a card's rows are from, without reading them. Raises DataError for a card that cannot be trained on."""
    refuse_training(card)
    if sample and not card.sample:
        raise DataError("DATA-012", f"the card {card.name} has no sample rows", "", "data.sample=false")
    if sample:
        files, licence, attribution = (
            {card.sample: sha256_file(inside(card.folder / card.sample, card.folder))},
            "Apache-2.0",
            "",
        )
    elif card.reader == "files":
        raise DataError(
            "DATA-012",
            f"the card {card.name} has only sample rows",
            card.note,
            "data=files data.train_files=[tickets.jsonl] data.heldout_fraction=0.1, or data.sample=true",
        )
    else:
        files = {f"{card.package} {card.version}": card.sha256} if card.package else _members(card)
        licence, attribution = card.licence, card.attribution
    return {
        "kind": "sample rows" if sample else "package",
        "files": files,
        "licence": licence,
        "attribution": attribution,
        "card": card.name,
        "card_sha256": sha256_file(card.folder / f"{card.name}.yaml"),
        "title": card.title,
        "note": card.note,
        "licence_source": card.licence_source,
        "passed_over": {},
    }


def _members(card: Card) -> dict[str, str]:
    """Hashes of the files beside a card that names no package."""
    names = [n for n in Beside(card.folder).namelist() if any(fnmatch.fnmatchcase(n, p) for p in card.members)]
    return {name: sha256_file(inside(card.folder / name, card.folder)) for name in names}


def word(rows: list[Row], card: Card, excerpt_words: int) -> None:
    """Turns fields into conversations by the card's templates; drops rows that its filters do not want.

    Further excerpts of long texts are appended to `rows`.
    """
    for row in list(rows):
        reason = _unwanted(row, card)
        if reason:
            row.drop(*reason)
            continue
        fields = row.fields
        if card.choices:
            row.label = card.labels[fields[card.label]] if card.labels else fields[card.label]
        row.group = fields[card.group]
        texts = [""]
        if card.text:
            texts = excerpts(fields[card.text], excerpt_words, card.excerpt, card.excerpts_per_text)
        further = [dataclasses.replace(row, id=f"{row.id}#{part}", part=part) for part in range(2, len(texts) + 1)]
        for each, excerpt in zip([row, *further], texts, strict=True):
            _fill(each, card, fields, excerpt)
        rows += further


def _unwanted(row: Row, card: Card) -> tuple[str, str] | None:
    """Why the card does not want the row (code, sentence), or None."""
    fields = row.fields
    for key in (card.label, card.group, card.text, *card.keep):
        if key and key not in fields:
            return "no-field", f"it has no {key}"
    for key, allowed in card.keep.items():
        if fields[key] not in allowed:
            return key, f"{key}={quoted(fields[key][:80])} is not among {', '.join(allowed)}"
    if card.text and len(fields[card.text].split()) < card.min_words:
        return "short", f"{len(fields[card.text].split())} words, the card wants {card.min_words}"
    if card.labels and fields[card.label] not in card.labels:
        return "class", f"{card.label}={quoted(fields[card.label])} belongs to no choice"
    return None


def _fill(row: Row, card: Card, fields: dict[str, str], excerpt: str) -> None:
    """Puts fields and excerpt into the card's templates."""
    values = {**fields, "excerpt": excerpt, "label": row.label}
    try:
        question, answer = card.question.format_map(values).strip(), card.answer.format_map(values).strip()
    except KeyError as error:
        row.drop("no-field", f"it has no {error.args[0]}")
        return
    except (ValueError, IndexError, AttributeError) as error:
        known = ", ".join(sorted(values))
        raise DataError(
            "DATA-008",
            f"card {card.name}: a template cannot be filled ({error})",
            f"fields: {known}",
            "question: and answer: with these fields, and {{ }} for braces that are none",
        ) from None
    if not answer:
        row.drop("no-answer", "its answer is empty")
        return
    opening = [{"role": "system", "content": card.system}] if card.system else []
    row.messages = [*opening, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    row.choices = list(card.choices)
    # What copies are looked for in: the part that the model sees (long texts with different heads can have the
    # same operative sentences), else the whole conversation.
    row.fields = {"text": excerpt} if card.near_duplicate else {}
