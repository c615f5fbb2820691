"""Files that are squeezed, read as the bytes that they hold. One that was cut is an error where it breaks off."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SQUEEZED = {".gz": "gzip", ".zst": "zstd"}
"""Suffix -> how the file is squeezed."""
PIECE = 2**10
"""Squeezed bytes that are unpacked at once: of zstd they hold 32 MiB at most."""


@contextmanager
def opened(path: Path, squeezed: str) -> Iterator[Any]:
    """A file as a stream of plain bytes; `squeezed` is one of SQUEEZED, or empty. Raises EOFError where it was cut."""
    if squeezed == "gzip":
        with gzip.open(path, "rb") as handle:
            yield handle
    elif squeezed == "zstd":
        with path.open("rb") as raw:
            yield io.BufferedReader(_Zstd(raw))
    else:
        with path.open("rb") as handle:
            yield handle


class _Zstd(io.RawIOBase):
    """One zstd frame after the other. To the reader of zstandard, a file that ends inside one is a whole one."""

    def __init__(self, raw: Any) -> None:
        self.raw, self.unread, self.ready = raw, b"", memoryview(b"")
        self.frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        while not self.ready:
            piece = self.unread or self.raw.read(PIECE)
            if not piece and self.frame is not None:
                raise EOFError("the file ends inside what is squeezed")
            if not piece:
                return 0
            self.frame = self.frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                self.ready = memoryview(self.frame.decompress(piece))
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            self.unread, self.frame = self.frame.unused_data, None if self.frame.eof else self.frame
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count
