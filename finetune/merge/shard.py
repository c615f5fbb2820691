"""One file of the merged checkpoint: what it is made of (`sheets`), and writing it (`write_sheet`).

Bytes without an update are copied. Tensors with one are read, summed, written and hashed one matrix at a time: of a
stack no thread has more than one expert in memory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import torch

from finetune.formats import scaled, to_fp8
from finetune.merge.plan import PLAIN_TYPES, Change, Plan
from finetune.merge.sums import Tally, add, squares
from finetune.shards import Entry

TYPES = PLAIN_TYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
}
"""Types of safetensors that are read here."""

PIECE = 2**20
"""Bytes that are copied at a time: few enough to be hashed before they leave the processor's cache."""


class Halted(Exception):
    """Another file could not be written: this one is left as it is."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes that stay as they are."""

    source: Path
    """The file they are in."""
    begin: int
    """Where they begin there."""
    to: int
    """Where they begin in the new file."""
    length: int
    """How many they are."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a changed tensor goes in the new file."""

    change: Change
    """The tensor."""
    values: int | None
    """Where its values begin; None when they are in another file."""
    scales: int | None = None
    """Where its new scales begin; None when it has none, or they are in another file."""

    @property
    def begin(self) -> int:
        """Where the first of its bytes that are computed here begins."""
        return (self.values if self.values is not None else self.scales) or 0


@dataclass(slots=True)
class Sheet:
    """One file of the merged checkpoint before it is written."""

    name: str
    """Its name."""
    header: bytes
    """Its first bytes: the length of the header, and the header."""
    size: int
    """Bytes of the whole file."""
    keys: list[str]
    """What tensors it holds."""
    copies: list[Copy] = field(default_factory=list)
    """Bytes that are copied."""
    places: list[Place] = field(default_factory=list)
    """Tensors that are computed."""


def sheets(plan: Plan) -> list[Sheet]:
    """The files of a merged checkpoint, by name."""
    if not plan.keeps_layout:
        return _plain_layouts(plan)
    parts: dict[Path, Part] = {}
    for key, entry in plan.entries.items():
        parts.setdefault(entry.file, Part()).keys.append(key)
    for change in plan.changes.values():
        for file in dict.fromkeys(entry.file for entry in change.weight.entries):
            parts[file].changes.append(change)
    for extra in plan.extras:
        parts[extra.weight.entries[0].file].extras.append(extra)
    return [_same_layout(file, part) for file, part in sorted(parts.items())]


@dataclass(slots=True)
class Part:
    """What one file of the base holds."""

    keys: list[str] = field(default_factory=list)
    """Its tensors."""
    changes: list[Change] = field(default_factory=list)
    """Those that change, with what of them is in other files too."""
    extras: list[Change] = field(default_factory=list)
    """Tensors that come into being beside them."""


def _same_layout(file: Path, part: Part) -> Sheet:
    """The header of the base's file, and its bytes around those that change."""
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        text = handle.read(length)
    end = size = file.stat().st_size
    header = length.to_bytes(8, "little") + text
    if part.extras:
        content = json.loads(text)
        place = end - len(header)
        for extra in part.extras:
            old = extra.weight.entries[0]
            offsets = [place, place + old.bytes]
            content[extra.key] = {"dtype": old.dtype, "shape": list(old.shape), "data_offsets": offsets}
            place += old.bytes
        header = header_of(content)
        size = len(header) + place
    shift = len(header) - 8 - length
    sheet = Sheet(file.name, header, size, [*part.keys, *(extra.key for extra in part.extras)])
    spans = []
    for change in part.changes:
        at = [entry.offset + shift if entry.file == file else None for entry in change.weight.entries]
        sheet.places.append(Place(change, at[0], at[1] if len(at) > 1 else None))
        spans += [(e.offset, e.offset + e.bytes) for e in change.weight.entries if e.file == file]
    begin = 8 + length
    for span_begin, span_end in [*sorted(spans), (end, end)]:
        if span_begin > begin:
            sheet.copies.append(Copy(file, begin, begin + shift, span_begin - begin))
        begin = span_end
    for extra in part.extras:
        at_end = len(header) + content[extra.key]["data_offsets"][0]
        _place_plain(sheet, extra, at_end)
    sheet.places.sort(key=lambda place: place.begin)
    return sheet


def _plain_layouts(plan: Plan) -> list[Sheet]:
    """The weights of a quantised base in plain numbers, each in the file that its values were in."""
    files: dict[Path, list[Change]] = {}
    own = [plan.changes.get(key, Change(key, weight)) for key, weight in plan.weights.items()]
    for change in (*own, *plan.extras):
        files.setdefault(change.weight.entries[0].file, []).append(change)
    return [_plain_layout(file, sorted(tensors, key=lambda t: t.key)) for file, tensors in sorted(files.items())]


def _plain_layout(file: Path, tensors: list[Change]) -> Sheet:
    """The weights of one file of a quantised base in plain numbers, by key."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for change in tensors:
        weight = change.weight
        size = written_bytes(change)
        kind = "BF16" if weight.is_quantised else weight.entries[0].dtype
        content[change.key] = {"dtype": kind, "shape": list(weight.shape), "data_offsets": [begin, begin + size]}
        begin += size
    header = header_of(content)
    sheet = Sheet(file.name, header, len(header) + begin, [change.key for change in tensors])
    for change in tensors:
        _place_plain(sheet, change, len(header) + content[change.key]["data_offsets"][0])
    return sheet


def _place_plain(sheet: Sheet, change: Change, at: int) -> None:
    """Puts one tensor in plain numbers into a sheet: copied, or computed."""
    entry = change.weight.entries[0]
    if change.is_wanted or change.weight.is_quantised:
        sheet.places.append(Place(change, at))
    else:
        sheet.copies.append(Copy(entry.file, entry.offset, at, entry.bytes))


def header_of(content: dict[str, Any]) -> bytes:
    """The first bytes of a safetensors file: length and header, padded to whole eights."""
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def written_bytes(change: Change) -> int:
    """Bytes of a tensor in plain numbers."""
    if not change.weight.is_quantised:
        return change.weight.entries[0].bytes
    size = 2
    for length in change.weight.shape:
        size *= length
    return size


def write_sheet(
    plan: Plan, sheet: Sheet, path: Path, advance: Callable[[int], None] = lambda _: None, halt: Event | None = None
) -> tuple[Tally, str]:
    """Writes one file from its first byte to its last: sums of squares of what was added and lost, and its sha256.

    `advance` is told of bytes that are written. Raises Halted when `halt` is set before the file is whole.
    """
    tally = Tally()
    with path.open("w+b", buffering=0) as file:
        target = file.fileno()
        reserve(target, sheet.size)
        digest = Digest()
        for offset, data in _pieces(plan, sheet, tally):
            if halt is not None and halt.is_set():
                raise Halted
            write_at(target, data, offset)
            digest.update(data, offset)
            advance(len(data))
        return tally, digest.finish(target)


def _pieces(plan: Plan, sheet: Sheet, tally: Tally) -> Iterator[tuple[int, memoryview]]:
    """(offset, bytes) of a whole file, in its order as far as values and scales of a tensor are not apart."""
    yield 0, memoryview(sheet.header)
    work: list[Copy | Place] = [*sheet.copies, *sheet.places]
    for item in sorted(work, key=lambda item: item.to if isinstance(item, Copy) else item.begin):
        if isinstance(item, Copy):
            yield from _copied(item)
            continue
        for offset, tensor in outputs(plan, item, tally):
            yield offset, bytes_of(tensor)


def _copied(copy: Copy) -> Iterator[tuple[int, memoryview]]:
    """(offset in the new file, bytes) of a copy, piece by piece, each in the same memory."""
    buffer = memoryview(bytearray(min(copy.length, PIECE)))
    with copy.source.open("rb", buffering=0) as source:
        for done in range(0, copy.length, PIECE):
            piece = buffer[: min(PIECE, copy.length - done)]
            read_at(source.fileno(), piece, copy.begin + done)
            yield copy.to + done, piece


class Digest:
    """The sha256 of a file, taken while it is written: what has just been in the processor need not be read again."""

    def __init__(self) -> None:
        self._sum = hashlib.sha256()
        self._done = 0

    def update(self, data: memoryview, offset: int) -> None:
        """Takes bytes that were written at `offset`; those behind a gap are left for `finish`."""
        if offset == self._done:
            self._sum.update(data)
            self._done += len(data)

    def finish(self, file: int) -> str:
        """The hex digest of the whole file, of which the part behind the first gap is read again."""
        buffer = memoryview(bytearray(PIECE))
        while count := os.preadv(file, [buffer], self._done):
            self._sum.update(buffer[:count])
            self._done += count
        return self._sum.hexdigest()


def outputs(plan: Plan, place: Place, tally: Tally, *, updated: bool = True) -> Iterator[tuple[int, torch.Tensor]]:
    """(offset in the file, tensor to be written there) of one changed tensor, a matrix at a time.

    Without `updated` what would stand there if nothing were added, for comparison. A tensor whose values and scales lie
    in different files is computed for each of them.
    """
    change, requantise = place.change, plan.keeps_layout and place.change.weight.is_quantised
    shape = change.weight.shape
    counted = tally if place.values is not None else Tally()  # else it is counted where its values are
    for number in range(shape[0]) if len(shape) == 3 else (None,):
        matrix, scale = merged_matrix(plan, change, number, counted, updated=updated)
        step = number or 0
        if place.values is not None:
            yield place.values + step * matrix.nbytes, matrix
        if requantise and place.scales is not None and scale is not None:
            yield place.scales + step * scale.nbytes, scale


def merged_matrix(
    plan: Plan, change: Change, number: int | None, tally: Tally, *, updated: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(values, new scales or None) of one matrix of a tensor as they are written."""
    weight = change.weight
    stored = weight.entries[0]
    if not updated and (plan.keeps_layout or not weight.is_quantised):
        scale = read_matrix(weight.entries[1], number) if weight.is_quantised else None
        return read_matrix(stored, number), scale
    base = weight.read(number) if weight.is_quantised else read_matrix(stored, number)
    out = base
    pair = change.share.pair(number) if change.share is not None and updated else None
    if change.in_4bit and updated:
        out = torch.empty_like(base)
        base = _seen(plan, change, number, base, tally)
    if pair is not None or base is not out:
        add(base, pair, out, tally)
    if not weight.is_quantised:
        return out, None
    del base
    if not plan.keeps_layout:
        rounded = out.to(torch.bfloat16)
        if change.is_wanted:
            tally.rounding += squares(out.sub_(rounded))
        return rounded, None
    old = read_matrix(weight.entries[1], number)
    values, scale = to_fp8(out, old, plan.block, TYPES[stored.dtype])
    tally.rounding += squares(out.sub_(scaled(values, scale, plan.block)))
    return values, scale


def _seen(plan: Plan, change: Change, number: int | None, base: torch.Tensor, tally: Tally) -> torch.Tensor:
    """What training saw of a matrix that it held in 4 bits."""
    four_bit = plan.how.four_bit
    assert four_bit is not None
    if change.whole is None:
        seen = four_bit.seen(base, stacked=change.stacked)
    else:
        parts = [w.read(number) if w.is_quantised else read_matrix(w.entries[0], number) for w in change.whole]
        index = next(i for i, part in enumerate(change.whole) if part is change.weight)
        seen = four_bit.seen(torch.cat(parts), stacked=change.stacked).chunk(len(parts))[index]
    tally.four_bit += squares(seen.float() - base.float())
    return seen


def read_matrix(entry: Entry, number: int | None) -> torch.Tensor:
    """A tensor of a file as it is stored, or one matrix of it, read into memory of its own."""
    shape = entry.shape if number is None else entry.shape[1:]
    size = entry.bytes if number is None else entry.bytes // entry.shape[0]
    buffer = torch.empty(size, dtype=torch.uint8)
    with entry.file.open("rb", buffering=0) as file:
        read_at(file.fileno(), buffer.numpy().data, entry.offset + (number or 0) * size)
    return buffer.view(TYPES[entry.dtype]).view(shape)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, not copied."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_at(file: int, buffer: memoryview, offset: int) -> None:
    """Fills a buffer from a place in a file."""
    done = 0
    while done < len(buffer):
        count = os.preadv(file, [buffer[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "a weight file is shorter than it was")
        done += count


def reserve(file: int, size: int) -> None:
    """Gives an empty file its size and, where the system can, its room on the disk: writing is faster then.

    Raises OSError ENOSPC where there is none, before anything is written.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)


def write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data` at a place in a file."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(file, view[done:], offset + done)
