"""Which tensors differ on disk between a base and what was merged into it, byte by byte: `compare(plan, merged)`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch

from finetune.merge.plan import Change, Plan
from finetune.merge.shard import PIECE, Copy, Place, Sheet, bytes_of, outputs, read_at, read_matrix, sheets
from finetune.merge.sums import Tally
from finetune.merge.updates import New


@dataclass(slots=True)
class Changed:
    """What a comparison found."""

    tensors: int = 0
    """Tensors that have an update."""
    changed: int = 0
    """How many of them differ on disk."""
    zero: int = 0
    """How many have an update of zero."""
    rounded_away: int = 0
    """How many have an update of which their stored type holds nothing."""
    strangers: list[str] = field(default_factory=list)
    """Tensors that differ without an update, or not as their update says."""


def compare(plan: Plan, merged: Path) -> Changed:
    """Reads every byte of a merged folder beside the base's. `plan` is made anew from base and adapter.

    A tensor with an update that is the same on disk is computed again, and a stranger unless it comes out as it is.
    """
    found = Changed()
    for sheet in sheets(plan):
        path = merged / sheet.name
        if not path.is_file() or path.stat().st_size != sheet.size:
            found.strangers.append(f"{sheet.name} (missing, or of another size)")
            continue
        with path.open("rb", buffering=0) as file:
            if file.read(len(sheet.header)) != sheet.header:
                found.strangers.append(f"{sheet.name} (its header)")
                continue
            for copy in sheet.copies:
                if (at := _first_difference(file, copy)) is not None:
                    found.strangers.append(_key_at(plan, sheet, copy, at))
            for place in sheet.places:
                _compare_tensor(plan, place, file, found)
    return found


def _compare_tensor(plan: Plan, place: Place, file: BinaryIO, found: Changed) -> None:
    change = place.change
    same = _is(plan, place, file, updated=False)
    if place.values is None:  # its new scales alone lie here; it is counted where its values are
        if same and not _is(plan, place, file, updated=True):
            found.strangers.append(change.key)
        return
    if not change.is_wanted:
        found.strangers += [] if same else [change.key]
        return
    found.tensors += 1
    if not same:
        found.changed += 1
    elif not _is(plan, place, file, updated=True):
        found.strangers.append(change.key)
    elif change.share is not None and _is_zero(plan, place):
        found.zero += 1
    else:
        found.rounded_away += 1


def _is(plan: Plan, place: Place, file: BinaryIO, *, updated: bool) -> bool:
    """Whether a tensor on disk is, to the byte, what it would be with or without its update."""
    for offset, tensor in outputs(plan, place, Tally(), updated=updated):
        expected = bytes_of(tensor)
        stored = bytearray(len(expected))
        read_at(file.fileno(), memoryview(stored), offset)
        if stored != expected:
            return False
    return True


def _is_zero(plan: Plan, place: Place) -> bool:
    share, shape = place.change.share, place.change.weight.shape
    assert share is not None
    return all(_changes_nothing(place.change, number) for number in (range(shape[0]) if len(shape) == 3 else (None,)))


def _changes_nothing(change: Change, number: int | None) -> bool:
    assert change.share is not None
    pair, weight = change.share.pair(number), change.weight
    if isinstance(pair, New):
        base = weight.read(number) if weight.is_quantised else read_matrix(weight.entries[0], number)
        return torch.equal(pair.values, base.float())
    return pair.lengths_O is None and not torch.count_nonzero(pair.left_Or)


def _first_difference(file: BinaryIO, copy: Copy) -> int | None:
    """Where in the base's file the first piece begins that is not the same in the merged file; None without one."""
    ours, theirs = bytearray(min(copy.length, PIECE)), bytearray(min(copy.length, PIECE))
    with copy.source.open("rb", buffering=0) as source:
        for begin in range(0, copy.length, PIECE):
            size = min(PIECE, copy.length - begin)
            if size < len(ours):
                ours, theirs = bytearray(size), bytearray(size)
            read_at(source.fileno(), memoryview(ours), copy.begin + begin)
            read_at(file.fileno(), memoryview(theirs), copy.to + begin)
            if ours != theirs:
                return copy.begin + begin + next(i for i in range(size) if ours[i] != theirs[i])
    return None


def _key_at(plan: Plan, sheet: Sheet, copy: Copy, at: int) -> str:
    """The tensor of the base that a byte belongs to."""
    for key, entry in plan.entries.items():
        if entry.file == copy.source and entry.offset <= at < entry.offset + entry.bytes:
            return key
    return f"{sheet.name} (between its tensors)"
