"""Rows of a task that the training rows contain: `found_in(...)`, by the hashes of `data/contamination.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from finetune.data.contamination import HOW, Indexes, build
from finetune.data.items import Item
from finetune.errors import DataError


def found_in(items: Mapping[str, Sequence[Item]], code: bool, texts: Iterable[str]) -> dict[str, str]:
    """Id of an item -> how it was found in one of `texts`: the strongest of HOW. `items` by the name of their task.

    They should be all rows of a task, not those drawn alone: what many of them share is taken for its wording.
    """
    built = []
    for name, rows in items.items():
        try:
            built.append(build(rows, name, "code" if code else "text"))
        except DataError:
            continue  # every item is too short to be looked for
    found: dict[str, str] = {}
    if not built:
        return found
    indexes = Indexes(built)
    for text in texts:
        for _, hit in indexes.hits(text):
            if hit.item not in found or HOW.index(hit.how) < HOW.index(found[hit.item]):
                found[hit.item] = hit.how
    return found


def texts_of(train: Any, tokenizer: Any) -> Iterator[str]:
    """The words of every training row; rows that came as tokens are decoded."""
    for row in train:
        messages: Sequence[Mapping[str, Any]] = row["messages"] or []
        if messages:
            yield "\n".join(str(message["content"] or "") for message in messages)
        else:
            yield tokenizer.decode(row["input_ids"], skip_special_tokens=True)
