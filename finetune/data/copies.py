"""What near copies mean: one that trains on what is held out leaks; others are counted or dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.near import common_values, near_copies
from finetune.data.rows import SHOWN
from finetune.data.verdicts import HELDOUT, TRAIN, Facts
from finetune.errors import DataError
from finetune.recipe import Data

TEMPLATE = 20
"""Rows whose runs of words are a template that they share, and make none of them a near copy of a held-out one. In sets
below 80 rows a quarter of them, but no fewer than LEAST."""

LEAST = 5


def near_finder(data: Data, scratch: Path) -> Callable[[Facts], list[str]]:
    """What `decide` calls for near copies: across the sides first, then within each; sentences for a person.

    A training row that is nearly a held-out one is dropped where the split is ours, because nobody chose it. Between
    the user's own files for both sides it is a leak, and `data.leakage` says what that means (DATA-013). Wording that
    many rows share does not count here, unless the user wants near copies dropped.
    """

    def find(facts: Facts) -> list[str]:
        return [*_across(facts, data, scratch), *_within(facts, data, scratch)]

    return find


def _across(facts: Facts, data: Data, scratch: Path) -> list[str]:
    held = facts.split == HELDOUT
    if not held.any():
        return []
    taking, signatures, template = held | (facts.split == TRAIN), _signatures(facts), None
    if data.near_duplicates == "report":
        template = common_values(signatures, taking, template_rows(int(taking.sum())))
    pairs = list(near_copies(signatures, data.near_share, taking, scratch, against=held, common=template))
    if not pairs:
        return []
    if data.heldout_files and data.leakage == "error":
        lines = [f"  {facts.where(a)} is {share:.0%} held-out {facts.where(b)}" for a, b, share in pairs[:SHOWN]]
        more = [f"  and {len(pairs) - SHOWN} more"] if len(pairs) > SHOWN else []
        title = f"{len(pairs)} training rows are nearly held-out ones (share of five-word runs):"
        fix = "remove them, or data.leakage=drop, or data.near_duplicates=off"
        facts.drop([row for row, _, _ in pairs], "DATA-013", [other for _, other, _ in pairs])
        raise DataError("DATA-013", "\n".join([title, *lines, *more]), "", fix)
    facts.drop([row for row, _, _ in pairs], "near-copy", [other for _, other, _ in pairs])
    return [f"{len(pairs)} training rows are nearly held-out ones and are dropped"]


def template_rows(rows: int) -> int:
    """How many of so many rows must have a run of words for it to be a template."""
    return max(LEAST, min(TEMPLATE, rows // 4))


def _within(facts: Facts, data: Data, scratch: Path) -> list[str]:
    told = []
    for split, name in ((TRAIN, "training"), (HELDOUT, "held-out")):
        pairs = list(near_copies(_signatures(facts), data.near_share, facts.split == split, scratch))
        if not pairs:
            continue
        rows, others = np.array([row for row, _, _ in pairs]), [other for _, other, _ in pairs]
        example = f"e.g. {facts.where(int(rows[0]))} of {facts.where(others[0])}"
        if data.near_duplicates == "drop":
            facts.drop(rows, "near-copy", others)
            told.append(f"{len(pairs)} {name} rows are nearly earlier ones and are dropped, {example}")
        else:
            facts.other[rows] = others
            told.append(
                f"{len(pairs)} {name} rows are nearly earlier ones, {example}; data.near_duplicates=drop drops them"
            )
    return told


def _signatures(facts: Facts) -> list[Any]:
    return [part.flatten().to_numpy().reshape(len(part), -1) for part in facts.table["signature"].chunks]
