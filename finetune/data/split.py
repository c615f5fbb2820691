"""Which rows train and which are held out: by group, balanced, without near-copies across, the same on every machine.

Order comes from sha256 of names, never from a random state of a library, so that a split can be checked years later.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from finetune.data.card import Card
from finetune.data.rows import Row

RUN = 5
"""Words in a run when two texts are compared."""


def split_card(rows: list[Row], card: Card) -> None:
    """Sets `split` of every kept row, or drops it with the reason. Held-out rows come from groups that never train.

    Groups go to the held-out side in the order of their hash until that side is full, each giving at most
    `heldout_per_group` rows; then near-copies of held-out texts leave the training side; then classes are balanced.
    Rows that were made have their split already, by their seed.
    """
    drop_copies(rows)
    if card.seeds:
        balance(rows, "heldout", [], card.heldout_rows)
        balance(rows, "train", [], card.train_rows)
        return
    kept = [row for row in rows if not row.code]
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(kept, key=lambda row: (row.part, order(row.id))):
        groups[row.group].append(row)
    classes = card.choices if card.balanced and card.choices else []
    wanted = dict.fromkeys(classes, card.heldout_rows // len(classes)) if classes else {"": card.heldout_rows}
    held = NearCopies(card.near_duplicate)
    for name in sorted(groups, key=order):
        texts = [row for row in groups[name] if row.part == 1]
        chosen = [row for row in texts if held.closest(row) is None][: card.heldout_per_group or None]
        need = Counter(row.label if classes else "" for row in chosen)
        small = not card.heldout_group_most or len(texts) <= card.heldout_group_most
        fits = small and bool(chosen) and all(wanted[c] >= n for c, n in need.items())
        for row in groups[name]:
            row.split = "heldout" if fits else "train"
        if fits:
            wanted = {c: n - need[c] for c, n in wanted.items()}
            for row in chosen:
                held.add(row)
            for row in groups[name]:
                if row not in chosen:
                    row.drop("group-limit", f"its group {name} is held out and gives {len(chosen)} rows")
    for row in rows:
        near = held.closest(row) if row.split == "train" and not row.code else None
        if near:
            row.drop("near-copy", f"{near[0]:.0%} of its runs of words are those of held-out {near[1].id}")
    balance(rows, "heldout", classes, card.heldout_rows)
    balance(rows, "train", classes, card.train_rows)


def split_fraction(rows: list[Row], fraction: float) -> None:
    """Sets `split` of every kept row: whole groups are held out, in the order of their hash, up to `fraction`."""
    drop_copies(rows)
    kept = [row for row in rows if not row.code]
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in kept:
        groups[row.group].append(row)
    wanted = round(fraction * len(kept))
    for name in sorted(groups, key=order):
        side = "heldout" if 0 < len(groups[name]) <= wanted else "train"
        wanted -= len(groups[name]) if side == "heldout" else 0
        for row in groups[name]:
            row.split = side


def limit(rows: list[Row], split: str, most: int) -> None:
    """Keeps the first `most` rows of a split in training order (0: all), which takes classes in turn."""
    if most:
        for row in in_order(rows, split)[most:]:
            row.drop("rows-limit", f"data.{'train' if split == 'train' else 'heldout'}_rows={most}")


def in_order(rows: Iterable[Row], split: str) -> list[Row]:
    """The rows of a split, classes in turn, within a class variety first: a shorter list is still a good one."""
    ranked: Counter[str] = Counter()
    keyed = []
    for row in _by_variety(row for row in rows if row.split == split and not row.code):
        keyed.append((ranked[row.label], row.label, row))
        ranked[row.label] += 1
    return [row for _, _, row in sorted(keyed, key=lambda k: k[:2])]


def order(name: str) -> str:
    """What rows and groups are sorted by: looks random, is the same everywhere."""
    return hashlib.sha256(name.encode()).hexdigest()


def drop_copies(rows: list[Row]) -> None:
    """Drops rows whose conversation or text is, without case, punctuation and spacing, that of an earlier row."""
    first: dict[str, Row] = {}
    for row in rows:
        if row.code:
            continue
        text = row.fields["text"] if "text" in row.fields else "\n".join(m["content"] for m in row.messages)
        key = " ".join(_words(text))
        if key in first:
            row.drop("copy", f"same text as {first[key].where}")
        first.setdefault(key, row)


class NearCopies:
    """A growing set of rows that can be asked for one with at least `share` of its five-word runs in common (Jaccard).

    Exact: an index from runs to rows finds every row with a run in common. `share` 0 means: never.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.rows: list[Row] = []
        self.runs: list[set[str]] = []
        self.index: dict[str, list[int]] = defaultdict(list)

    def add(self, row: Row) -> None:
        """Takes `row` into the set."""
        own = _runs(row) if self.share else set()
        for run in own:
            self.index[run].append(len(self.rows))
        self.rows.append(row)
        self.runs.append(own)

    def closest(self, row: Row) -> tuple[float, Row] | None:
        """The share and the row of the set that is nearest to `row`, or None when none comes near enough."""
        if not self.share:
            return None
        own = _runs(row)
        common = Counter(i for run in own if run in self.index for i in self.index[run])
        shares = ((n / (len(own) + len(self.runs[i]) - n), -i) for i, n in common.items())
        share, i = max(shares, default=(0.0, 0))
        return (share, self.rows[-i]) if share >= self.share else None


def balance(rows: list[Row], split: str, classes: list[str], most: int) -> None:
    """Keeps equally many rows of each class, together at most `most` (0: all there are); no classes: only `most`.

    Where a class has too many rows, every group first gives one, then a second: variety before size.
    """
    mine = [row for row in rows if row.split == split and not row.code]
    kinds = {c: [row for row in mine if row.label == c] for c in classes} if classes else {"": mine}
    each = min(map(len, kinds.values()))
    if most:
        each = min(each, most // len(kinds))
    for kind in kinds.values():
        for row in _by_variety(kind)[each:]:
            row.drop("balance" if classes else "rows-limit", f"{each} {split} rows" + " of each class" * bool(classes))


def _by_variety(rows: Iterable[Row]) -> list[Row]:
    """One row of every group, then a second of every group that has one, and so on; else in the order of their hash."""
    ranked: Counter[str] = Counter()
    keyed = []
    for row in sorted(rows, key=lambda row: (row.part, order(row.id))):
        keyed.append((ranked[row.group], order(row.id), row))
        ranked[row.group] += 1
    return [row for _, _, row in sorted(keyed, key=lambda k: k[:2])]


def _runs(row: Row) -> set[str]:
    words = _words(row.fields["text"] if "text" in row.fields else row.messages[-2]["content"])
    return {" ".join(words[i : i + RUN]) for i in range(max(1, len(words) - RUN + 1))}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
