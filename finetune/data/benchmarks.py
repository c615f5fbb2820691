"""All rows of an evaluation card as held-out conversations; cards that may be trained on go through `prepare`."""

from __future__ import annotations

from pathlib import Path

from finetune.data.card import Card, read_card
from finetune.data.items import Item
from finetune.data.readers import BELONGS, read_package
from finetune.data.rows import Row
from finetune.data.wording import wheel_of, word
from finetune.errors import DataError
from finetune.recipe import Recipe


def evaluation_rows(card: Card, wheel: Path) -> list[Row]:
    """Every row of an evaluation card in `wheel`, held out and in the order of the source.

    Unlike `split_card` this drops no copies: published scores count each row, and to the comparison by words two
    functions on `(` and on `<`, or the roots of `+` and of `,`, are one. Raises DataError DATA-009 when rows were lost.
    """
    if card.use != "evaluation":
        raise DataError(
            "DATA-040", f"the card {card.name} is for training", "its rows need a split", f"data={card.name}"
        )
    rows, _ = read_package(card, wheel)
    word(rows, card, card.excerpt_words)
    lost = [row for row in rows if row.code]
    if lost or len(rows) != card.heldout_rows:
        why = f"{lost[0].where}: {lost[0].why}" if lost else f"it has {len(rows)}"
        what = f"card {card.name} must give {card.heldout_rows} rows of {wheel.name}"
        raise DataError("DATA-009", what, why, BELONGS)
    for row in rows:
        row.split = "heldout"
    return rows


def items_of_card(name: str, recipe: Recipe) -> list[Item]:
    """The items of an evaluation card for an index: question and answer of every row.

    Raises what `evaluation_rows` raises, and FetchError when the card's package is not at hand.
    """
    card = read_card(name)
    return [
        Item(id=row.id, text=row.messages[-2]["content"], answer=row.messages[-1]["content"])
        for row in evaluation_rows(card, wheel_of(card, recipe))
    ]
