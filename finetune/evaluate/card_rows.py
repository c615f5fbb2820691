"""Rows of data cards as files that the harness reads: `card_file(leaf, recipe) -> Path`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from finetune.data.benchmarks import evaluation_rows
from finetune.data.card import Card, read_card
from finetune.data.readers import BELONGS, read_package
from finetune.data.rows import Row, read_messages
from finetune.data.wording import from_card, wheel_of
from finetune.errors import DataError
from finetune.fetch import cache_folder
from finetune.recipe import Recipe
from finetune.rundir import write_text
from finetune.tasks import Leaf, own_folder


def card_file(leaf: Leaf, recipe: Recipe) -> Path:
    """A JSONL file in the cache with the held-out rows of the card that `leaf` names; equal rows are one file.

    Keys: id, prompt, answer, choices, part (the file of the source), and for a task that asks for `fields` those of the
    source instead of prompt and choices. With `data.sample` they are the sample rows. Raises DataError and FetchError.
    """
    card = read_card(leaf.said("card"))
    records = _fields(leaf, card, recipe) if leaf.said("fields") else [_record(row) for row in _rows(card, recipe)]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    folder = cache_folder(recipe) / "tasks"
    path = folder / f"{leaf.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return path


def _rows(card: Card, recipe: Recipe) -> list[Row]:
    """The rows of a card that are never trained on."""
    if card.use == "evaluation" and recipe.data.sample:
        return read_messages(card.folder / card.sample)
    if card.use == "evaluation":
        return evaluation_rows(card, wheel_of(card, recipe))
    data = dataclasses.replace(recipe.data, card=card.name, train_rows=0, heldout_rows=0, excerpt_words=0)
    return [row for row in from_card(dataclasses.replace(recipe, data=data)).rows if row.split == "heldout"]


def _record(row: Row) -> dict[str, Any]:
    *before, last = row.messages
    prompt = "\n\n".join(message["content"] for message in before)
    return {
        "id": row.id,
        "prompt": prompt,
        "answer": last["content"],
        "choices": row.choices,
        "part": Path(row.file).stem,
    }


def _fields(leaf: Leaf, card: Card, recipe: Recipe) -> list[dict[str, Any]]:
    """The source's own fields of every row, and the card's answer."""
    if recipe.data.sample:
        lines = (own_folder() / leaf.said("sample")).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    wheel = wheel_of(card, recipe)
    fields = {row.id: dict(row.fields) for row in read_package(card, wheel)[0]}
    made = []
    for row in evaluation_rows(card, wheel):
        if lacks := [name for name in leaf.said("fields") if name not in fields[row.id]]:
            what, why = f"{row.id} of {wheel.name} has no {lacks[0]}", f"the task {leaf.name} needs it"
            raise DataError("DATA-009", what, why, BELONGS)
        own = {name: fields[row.id][name] for name in leaf.said("fields")}
        made.append({"id": row.id, "answer": row.messages[-1]["content"], **own})
    return made
