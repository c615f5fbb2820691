"""The header of a GGUF file, walked with bounds before the gguf library maps it: `check_gguf(path)`.

Readers of this format have been made to overflow by counts and lengths in it (CVE-2025-53630, CVE-2026-27940). The
layout is that of ggml's docs/gguf.md: magic, version, number of tensors and of keys, the keys with typed values, the
tensors' names, shapes, types and offsets, then padding to the alignment and the data.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

TENSORS, KEYS, TEXT, ITEMS, NAME, DIMENSIONS = 100_000, 100_000, 16 * 2**20, 4_000_000, 256, 4
"""Most tensors, keys, bytes of a text, items of an array, bytes of a name, dimensions of a tensor."""

HEADER = 512 * 2**20
"""Bytes before the data, at most."""

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Number of a value's type -> its bytes; 8 is a text, 9 an array."""

STRING, ARRAY, UINT32 = 8, 9, 4
ALIGNMENT_KEY, ALIGNMENTS = b"general.alignment", {2**power for power in range(3, 21)}


class GgufError(ValueError):
    """Why a GGUF file cannot be believed, as a phrase."""


def check_gguf(path: Path) -> None:
    """Nothing, or GgufError unless every count, length and offset in the header stays within bounds and the file."""
    with path.open("rb") as handle:
        _Walk(handle, path.stat().st_size).check()


class _Walk:
    """Reads on, never past the end of the file."""

    def __init__(self, handle: BinaryIO, size: int) -> None:
        self.handle, self.size, self.alignment = handle, size, 32

    def check(self) -> None:
        if self.take(4) != b"GGUF":
            raise GgufError("it does not begin with GGUF")
        version = self.number("<I")
        if version not in (2, 3):
            raise GgufError(f"its version is {version}; 2 and 3 are read")
        tensors = self.count("tensors", TENSORS)
        keys = self.count("keys", KEYS)
        seen: set[bytes] = set()
        for _ in range(keys):
            key = self.text(2**16)
            if key in seen:
                raise GgufError(f"it has the key {_shown(key)} twice")
            seen.add(key)
            kind = self.number("<I")
            if key == ALIGNMENT_KEY:
                self.alignment = self.number("<I") if kind == UINT32 else 0
                if self.alignment not in ALIGNMENTS:
                    raise GgufError(f"its alignment is {self.alignment}, no power of two from 8 to 2^20")
            else:
                self.value(kind, key)
        places = dict(self.tensor() for _ in range(tensors))
        if len(places) != tensors:
            raise GgufError("it has two tensors of one name")
        begin = -(-self.handle.tell() // self.alignment) * self.alignment
        for name, offset in places.items():
            if offset % self.alignment or begin + offset >= self.size:
                raise GgufError(f"{_shown(name)} would begin at byte {begin + offset:,} of {self.size:,}")

    def tensor(self) -> tuple[bytes, int]:
        """Name and offset of the next tensor; its shape must be one that the file has room for."""
        name, dimensions = self.text(NAME), self.number("<I")
        if not 0 <= dimensions <= DIMENSIONS:
            raise GgufError(f"{_shown(name)} has {dimensions} dimensions")
        values = 1
        for _ in range(dimensions):
            values *= self.number("<Q")
        kind, offset = self.number("<I"), self.number("<Q")
        if values > 32 * self.size or kind > 256:  # fewer than 2 bits a value is no format there is
            raise GgufError(f"{_shown(name)} has {values:,} values of type {kind}, more than the file can hold")
        return name, offset

    def value(self, kind: int, key: bytes) -> None:
        """Passes over a value."""
        if kind in SIZES:
            self.skip(SIZES[kind])
        elif kind == STRING:
            self.text(TEXT)
        elif kind == ARRAY:
            inner, count = self.number("<I"), self.count(f"items of {_shown(key)}", ITEMS)
            if inner in SIZES:
                self.skip(count * SIZES[inner])
            elif inner == STRING:
                for _ in range(count):
                    self.skip(self.length(TEXT))
            else:
                raise GgufError(f"{_shown(key)} is an array of type {inner}")
        else:
            raise GgufError(f"{_shown(key)} is of type {kind}")

    def count(self, what: str, most: int) -> int:
        """A number of things, at most `most`."""
        found = self.number("<Q")
        if found > most:
            raise GgufError(f"it would have {found:,} {what}, of at most {most:,}")
        return found

    def length(self, most: int) -> int:
        """The length of a text, at most `most`."""
        return self.count("bytes of a text", most)

    def text(self, most: int) -> bytes:
        """A text."""
        return self.take(self.length(most))

    def number(self, form: str) -> int:
        """A whole number."""
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def take(self, count: int) -> bytes:
        """The next bytes."""
        found = self.handle.read(count)
        if len(found) < count or self.handle.tell() > HEADER:
            raise GgufError("its header ends before it is complete, or never")
        return found

    def skip(self, count: int) -> None:
        """Passes over the next bytes."""
        self.handle.seek(count, 1)
        if self.handle.tell() > min(self.size, HEADER):
            raise GgufError("its header ends before it is complete, or never")


def _shown(name: bytes) -> str:
    return name[:60].decode("utf-8", "replace")
