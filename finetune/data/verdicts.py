"""Which rows are kept, decided over all of them at once: faults, copies, the split, leaks, mixtures and limits.

Works on columns of a few bytes per row (`facts`), never on the rows themselves, so that millions fit.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.rows import NUMBER, SHOWN, moment, where
from finetune.errors import DataError
from finetune.recipe import Data

if TYPE_CHECKING:
    from datasets import Dataset

TRAIN, HELDOUT = 1, 2
"""Values of `Facts.split`; 0 is neither."""

STRETCHES = 8
"""Stretches of a text's passages that are held out, at least, where there are so many passages to hold out."""

SPLITS = {"": 0, "train": TRAIN, "heldout": HELDOUT}
_ODD = np.uint64(0x9E3779B97F4A7C15)

FAULT = re.compile(r"[A-Z]+-\d+")
"""Codes of faults; other codes are words, and say why a good row is not used."""


class Facts:
    """The columns of all parts, one entry per row that came in, in the order of the files."""

    def __init__(self, parts: Dataset) -> None:
        self.table = parts.with_format("arrow")[:]
        """The parts themselves, mapped from disk: a record batch is a part (columns: `part.part_schema`)."""
        self.files, self.file = self._numbered("file", [])
        self.labels, self.label = self._numbered("label", [])
        self.codes, code = self._numbered("code", [""])
        self.code = code.astype(np.int16)
        self.split = self._numbered("split", list(SPLITS))[1].astype(np.int8)
        self.split[self.code > 0] = 0
        self.other = np.full(len(self), -1, dtype=np.min_scalar_type(-len(self)))
        """The earlier row that a copy is a copy of."""

    def column(self, name: str) -> Any:
        """A column of all rows as an array, read from disk for as long as it is used."""
        return self.table[name].to_numpy()

    def _numbered(self, name: str, known: list[str]) -> tuple[list[str], Any]:
        """(values of a column, those `known` first, the number of each row's)."""
        numbers = {text: number for number, text in enumerate(known)}
        column = []
        for chunk in self.table[name].chunks:
            entry = chunk.dictionary_encode()
            local = [numbers.setdefault(text, len(numbers)) for text in entry.dictionary.to_pylist()]
            column.append(np.array(local or [0], dtype=np.min_scalar_type(len(numbers)))[entry.indices.to_numpy()])
        return list(numbers), np.concatenate(column)

    @property
    def ignored(self) -> list[str]:
        """Columns of the files that have no meaning here."""
        return sorted({name for chunk in self.table["ignored"].chunks for name in chunk.flatten().unique().to_pylist()})

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def open(self) -> Any:
        """Which rows no verdict has dropped yet."""
        return self.code == 0

    def drop(self, rows: Any, code: str, other: Any = None) -> None:
        """Drops rows (indices) with a code; `other` names the row that each resembles."""
        if code not in self.codes:
            self.codes.append(code)
        self.code[rows] = self.codes.index(code)
        self.split[rows] = 0
        if other is not None:
            self.other[rows] = other

    def where(self, row: int) -> str:
        """`file:line` of a row."""
        line, nth = (self.table[name][int(row)].as_py() for name in ("line", "nth"))
        return where(self.files[self.file[row]], line, nth)

    def why(self, row: int) -> str:
        """The sentence that a row got when it was read."""
        return str(self.table["why"][int(row)].as_py())


def decide(facts: Facts, data: Data, *, given: bool, long: str, near: Callable[[Facts], Any] | None) -> list[str]:
    """Sets code and split of every row; returns what a person should know. Raises DataError with all that must not be.

    `given`: a card has split the rows already. `near` finds near duplicates and drops them if it is told to.
    """
    if not given:
        _same_ids(facts)
    told = _faults(facts, data)
    if not given:
        _copies(facts, data)
        if not data.heldout_files:
            told += _held_out(facts, data)
    if near is not None:
        told += near(facts)
    if not given:
        _mix(facts, data)
        for split, name, most in ((TRAIN, "train", data.train_rows), (HELDOUT, "heldout", data.heldout_rows)):
            beyond = by_class(facts, np.flatnonzero(facts.split == split))[most:] if most else []
            if len(beyond):
                facts.drop(beyond, "rows-limit")
                told.append(f"{len(beyond)} {name} rows are beyond data.{name}_rows={most} and left out; 0 takes all")
    told += _leaks(facts, data)
    _too_long(facts, data, long)
    for split, name, fix in (
        (TRAIN, "train", "give more rows"),
        (HELDOUT, "heldout", "data.heldout_files=[...] or a larger data.heldout_fraction"),
    ):
        if not (facts.split == split).any():
            codes = dropped(facts)
            why = ", ".join(f"{n} {code}" for code, n in codes.items())
            if next(iter(codes), "") == "near-copy":  # more rows of the kind would be dropped as well
                fix = f"data.near_duplicates=off, or data.near_share above {data.near_share:g}"
            raise DataError("DATA-009", f"no {name} row is left of {len(facts)}", f"dropped: {why or 'none'}", fix)
    return told


def dropped(facts: Facts) -> dict[str, int]:
    """Code -> rows, most frequent first."""
    counts = Counter({facts.codes[i]: int(n) for i, n in enumerate(np.bincount(facts.code)) if i and n})
    return dict(counts.most_common())


def in_order(facts: Facts, split: int) -> Any:
    """The rows of a split (indices) in the order in which they are written: a card's own, else of the files.

    Where answers are choices, classes come in turn, and within a class variety first: a shorter list is a good one too.
    """
    rows = np.flatnonzero(facts.split == split)
    if facts.table["place"][int(rows[0])].as_py() >= 0 and (place := facts.column("place")[rows]).min() >= 0:
        return rows[np.argsort(place, kind="stable")]
    return by_class(facts, rows) if (facts.label[rows] != facts.label[rows[0]]).any() else rows


def by_class(facts: Facts, rows: Any) -> Any:
    """Classes in turn; within a class one row of every group, then a second of every group, else by their hash."""
    order_key = facts.column("order_key")
    first = rows[np.lexsort((order_key[rows], facts.column("further")[rows]))]
    various = first[np.lexsort((order_key[first], rank(facts.column("group_key")[first])))]
    return various[np.lexsort((facts.label[various], rank(facts.label[various])))]


def rank(keys: Any) -> Any:
    """For each entry, how many equal ones stand before it."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    begins = np.concatenate(([True], ordered[1:] != ordered[:-1])) if len(keys) else np.zeros(0, bool)
    start = np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0)) if len(keys) else np.zeros(0, int)
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[order] = np.arange(len(keys)) - start
    return ranks


def earlier(keys: Any) -> tuple[Any, Any]:
    """(entries that equal an earlier one, the first entry of each)."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1  # in runs, each behind the first entry that it equals
    begins = np.concatenate(([True], np.diff(again) > 1)) if len(again) else np.zeros(0, bool)
    first = np.maximum.accumulate(np.where(begins, again - 1, 0))
    late, origin = order[again], order[first]
    in_turn = np.argsort(late)
    return late[in_turn], origin[in_turn]


def _same_ids(facts: Facts) -> None:
    rows = np.flatnonzero(facts.open)
    late, first = earlier(facts.column("order_key")[rows])
    facts.drop(rows[late], "DATA-002", rows[first])


def _faults(facts: Facts, data: Data) -> list[str]:
    """Raises for faulty rows, unless they may be dropped and are few."""
    bad = np.isin(facts.code, [i for i, code in enumerate(facts.codes) if FAULT.fullmatch(code) and code != "MASK-001"])
    count, lines = int(bad.sum()), len(facts)
    if not count:
        return []
    fatal = np.isin(facts.code, [i for i, code in enumerate(facts.codes) if code == "DATA-014"])
    share = count / lines
    if data.on_bad_row == "drop" and share <= data.max_drop_fraction and not fatal.any():
        return [f"{count} of {lines} rows have faults ({share:.1%}) and are dropped, as data.on_bad_row=drop says"]
    shown = np.flatnonzero(fatal if fatal.any() else bad)
    title = f"{len(shown)} of {lines} rows " + (
        "contain an evaluation item" if fatal.any() else f"have faults ({share:.1%})"
    )
    if data.on_bad_row == "drop" and not fatal.any():
        title += f", more than data.max_drop_fraction={data.max_drop_fraction:.1%}"
    raise listed_rows(facts, shown, title, share)


def listed_rows(facts: Facts, rows: Any, title: str, share: float = 0.0) -> DataError:
    """One error for many rows: the count by code, and the first 20 in full. Its id is that of the first.

    `share` is how many of all rows they are.
    """
    counts = Counter(facts.codes[facts.code[row]] for row in rows)
    lines = []
    for row in rows[:SHOWN]:
        other, where = int(facts.other[row]), facts.where(int(row))
        why = f"has the id of {facts.where(other)}" if other >= 0 else facts.why(int(row))
        lines.append(f"  {facts.codes[facts.code[row]]} {where} {why}")
    if len(rows) > SHOWN:
        rest = ", ".join(f"{n} x {code}" for code, n in counts.most_common())
        lines.append(f"  and {len(rows) - SHOWN} more; all: {rest}")
    enough = max(0.05, math.ceil(100 * share) / 100)
    fix = f"mend these rows, or data.on_bad_row=drop data.max_drop_fraction={enough:g}"
    if facts.codes[facts.code[rows[0]]] == "DATA-014":
        fix = "remove these rows, or data.benchmarks={INDEX: drop}"
    return DataError(facts.codes[facts.code[rows[0]]], "\n".join([f"{title}:", *lines]), "", fix)


def _copies(facts: Facts, data: Data) -> None:
    rows = np.flatnonzero(facts.open)
    keys = facts.column("text_key")[rows] ^ (facts.split[rows].astype(np.uint64) * _ODD)
    late, first = earlier(keys)  # with files for both sides a copy across them is a leak, told as such
    if data.duplicates == "drop":
        facts.drop(rows[late], "copy", rows[first])
    else:
        facts.other[rows[late]] = rows[first]


def _held_out(facts: Facts, data: Data) -> list[str]:
    """Whole groups are held out in the order of their hash, up to the fraction; or the newest rows, by `time_by`.

    A text that is too long for that gives stretches of neighbouring passages; a sentence says so.
    """
    rows = np.flatnonzero(facts.open)
    wanted = round(data.heldout_fraction * len(rows))
    if data.time_by:
        group_key = facts.column("group_key")
        newest = rows[np.argsort(times(facts)[rows], kind="stable")][::-1]
        facts.split[rows] = TRAIN
        facts.split[newest[:wanted]] = HELDOUT
        old = np.isin(group_key[rows], group_key[newest[:wanted]]) & (facts.split[rows] == TRAIN)
        facts.drop(rows[old], "group-held-out")
        return []
    keys, told = _stretches(facts, rows, wanted)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    begins = np.flatnonzero(np.concatenate((np.ones(1, bool), keys[1:] != keys[:-1])))
    del keys
    sizes = np.diff(begins, append=len(rows))
    sides = np.full(len(sizes), TRAIN, dtype=np.int8)
    for group, size in enumerate(sizes):
        if size <= wanted:
            sides[group], wanted = HELDOUT, wanted - size
        if not wanted:
            break
    side_of = np.empty(len(rows), dtype=np.int8)
    side_of[order] = np.repeat(sides, sizes)
    facts.split[rows] = side_of
    return told


def _stretches(facts: Facts, rows: Any, wanted: int) -> tuple[Any, list[str]]:
    """(the group of each row, where a text with more than `wanted` passages has one for each stretch; what to say)."""
    keys, goes_on = facts.column("group_key")[rows], facts.column("goes_on")[rows]
    if not wanted or not goes_on.any():
        return keys, []
    texts, of_text, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    long = np.isin(texts, keys[goes_on]) & (sizes > wanted)
    if not long.any():
        return keys, []
    length = max(1, wanted // STRETCHES)
    stretch = (rank(keys) // length + 1).astype(np.uint64) * _ODD
    names = [facts.files[i] for i in np.unique(facts.file[rows[long[of_text]]])]
    told = f"too long to be held out whole: {', '.join(names[:3])}" + f" and {len(names) - 3} more" * (len(names) > 3)
    told += f"; stretches of {length} passages are held out and all others trained on, those beside them too, so that "
    told += "the held-out loss is that of a text which is known in part"
    return np.where(long[of_text], keys ^ stretch, keys), [told]


def times(facts: Facts) -> Any:
    """Seconds or numbers by which rows are ordered in time; 0 for a row that has none, which is a faulty one.

    A number of four digits is a year only in a column that has dates as well.
    """
    texts = [text for chunk in facts.table["time"].chunks for text in chunk.to_pylist()]
    years = not all(NUMBER.fullmatch(text) for text in texts if text)
    return np.array([moment(text, years=years) if text else 0.0 for text in texts], dtype=np.float64)


def _mix(facts: Facts, data: Data) -> None:
    """Leaves out training rows until sources stand in the shares of `data.mixture`."""
    if not data.mixture:
        return
    from finetune.data.files import named, sources

    names = named(list(data.mixture), sources([*data.train_files, *data.heldout_files]))
    owner: dict[str, str] = {}
    for entry, name in ((entry, name) for entry, found in names.items() for name in found):
        if name in owner:
            why, fix = "each share is of other rows", "every file in one entry of data.train_files only"
            raise DataError("DATA-031", f"data.mixture: {entry} and {owner[name]} both have {name}", why, fix)
        owner[name] = entry
    train = facts.split == TRAIN
    numbers = {entry: [i for i, file in enumerate(facts.files) if file in names[entry]] for entry in data.mixture}
    rows = {entry: np.flatnonzero(train & np.isin(facts.file, numbers[entry])) for entry in data.mixture}
    if empty := next((entry for entry in rows if not len(rows[entry])), ""):
        why = "its shares are kept by leaving out rows of the other entries: all of them"
        fix = f"rows for it, or data.train_files and data.mixture without {empty}"
        raise DataError("DATA-031", f"data.mixture: {empty} has no training row", why, fix)
    whole = min(len(rows[entry]) / share for entry, share in data.mixture.items())
    for entry, share in data.mixture.items():
        facts.drop(by_class(facts, rows[entry])[round(whole * share + 1e-9) :], "mixture")


def _leaks(facts: Facts, data: Data) -> list[str]:
    """Training rows with a held-out question are an error, or dropped.

    Where the split is ours, nobody chose that a conversation goes on from a held-out row: it is dropped in any case.
    """
    rows, others, last = leaking(facts)
    gone = np.full(len(rows), data.leakage == "drop") | ~last & (not data.heldout_files)
    told = []
    if gone.any():
        facts.drop(rows[gone], "leak", others[gone])
        said = ", as data.leakage=drop says" if data.leakage == "drop" else ": the split put them there"
        told = [f"{gone.sum()} training rows ask what is held out, and are dropped{said}"]
    rows, others = rows[~gone], others[~gone]
    if not len(rows):
        return told
    lines = [
        f"  {facts.where(b)} asks what {facts.where(a)} trains on"
        for a, b in zip(rows[:SHOWN].tolist(), others[:SHOWN].tolist(), strict=True)
    ]
    more = [f"  and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
    title = f"{len(rows)} training rows ask questions that are held out:"
    facts.drop(rows, "DATA-013", others)
    raise DataError("DATA-013", "\n".join([title, *lines, *more]), "", "remove them, or data.leakage=drop")


def leaking(facts: Facts) -> tuple[Any, Any, Any]:
    """(training rows that train on a held-out question, that held-out row, whether it is their last one), each once.

    A held-out row asks what stands before its last answer; a training row what stands before any answer it trains. The
    system message counts only where both have one: there it may say what is to be done with the question.
    """
    held = np.flatnonzero(facts.split == HELDOUT)
    asks, system = (facts.column(name)[held] for name in ("prompt_key", "system_key"))
    bare = system == 0
    known = [_ordered(asks ^ system * _ODD, held), _ordered(asks[bare], held[bare]), _ordered(asks, held)]
    found, start = [], 0
    for part in facts.table.select(["asks", "prompt_key", "system_key"]).to_batches():
        of = part["asks"].value_parent_indices().to_numpy()
        keys, rows = part["asks"].flatten().to_numpy(), start + of
        own, last = part["system_key"].to_numpy()[of], keys == part["prompt_key"].to_numpy()[of]
        other = np.full(len(rows), -1)
        training = facts.split[rows] == TRAIN
        for (ordered, numbers), query, may in zip(
            known, (keys ^ own * _ODD, keys, keys), (training, training, training & (own == 0)), strict=True
        ):
            if len(ordered):
                at = np.minimum(np.searchsorted(ordered, query), len(ordered) - 1)
                other = np.where((other < 0) & may & (ordered[at] == query), numbers[at], other)
        hits = np.flatnonzero(other >= 0)[::-1]  # so that the last turn is the first
        _, first = np.unique(rows[hits], return_index=True)
        found.append(np.stack([rows[hits], other[hits], last[hits]])[:, first])
        start += len(part)
    every = np.concatenate(found, axis=1)
    return every[0], every[1], every[2] > 0


def _ordered(keys: Any, rows: Any) -> tuple[Any, Any]:
    order = np.argsort(keys, kind="stable")
    return keys[order], rows[order]


def _too_long(facts: Facts, data: Data, long: str) -> None:
    """MASK-001 where a row that would be used does not fit, with the length that keeps all of them."""
    if "MASK-001" not in facts.codes:
        return
    rows = np.flatnonzero(facts.code == facts.codes.index("MASK-001"))
    if data.on_bad_row == "drop" and long == "cut" and len(rows) / len(facts) <= data.max_drop_fraction:
        return
    need = facts.column("need")[rows]
    raise DataError(
        "MASK-001",
        f"{len(rows)} of {len(facts)} rows would lose their answer to data.max_length={data.max_length}",
        f"the first is {facts.where(int(rows[0]))}; the longest row has {int(need.max())} tokens"
        if long != "cut"
        else f"the first is {facts.where(int(rows[0]))}; {int(need.max())} tokens keep a part of every answer",
        f"data.max_length={int(need.max())}, or data.too_long=drop",
    )
