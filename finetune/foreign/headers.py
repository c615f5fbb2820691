"""The header of a safetensors file, believed only when everything in it fits the file: `read_header(path)`.

The format (huggingface/safetensors, "Format"): 8 bytes little-endian length, so many bytes of JSON, then the tensors'
bytes without holes. The library's own parser checks most of this, but takes the last of two equal keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEADER_LIMIT = 100_000_000
"""Bytes of a header, at most; the format's own limit."""

INDEX_LIMIT = 256 * 2**20
"""Bytes of an index file, at most. One with 91,991 tensors has 9 MB."""

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Type of a tensor -> bits per value."""

DIMENSIONS, LENGTH, NAME = 16, 2**48, 4096
"""Most dimensions, most values along one, most characters of a key."""


class HeaderError(ValueError):
    """Why a header cannot be believed, as a phrase."""


def read_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """(where the tensors begin, key -> dtype, shape and data_offsets) of a safetensors file.

    Raises HeaderError unless the header is at most 100 MB of JSON with no key twice, every tensor has as many bytes as
    its type and shape need, and together they fill the file from the header to its end, without holes and overlaps.
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        first = handle.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or not 2 <= length <= HEADER_LIMIT:
            raise HeaderError(f"its header would have {length:,} bytes, of at most {HEADER_LIMIT:,}")
        if 8 + length > size:
            raise HeaderError(f"its header of {length:,} bytes is longer than the file")
        raw = handle.read(length)
    header = read_object(raw)
    header.pop("__metadata__", None)
    spans = []
    for key, value in header.items():
        begin, end = _entry(key, value)
        spans.append((begin, end, key))
    at = 0
    for begin, end, key in sorted(spans):
        if begin != at:
            raise HeaderError(f"{key[:80]} begins at byte {begin:,} of the data, the tensor before it ends at {at:,}")
        at = end
    if 8 + length + at != size:
        raise HeaderError(f"it has {size:,} bytes, its header describes {8 + length + at:,}")
    return 8 + length, header


def read_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in some bytes. Raises HeaderError when it is none, or has a key twice, at any depth."""
    twice: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) < len(items):
            seen: set[str] = set()
            twice.extend(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return made

    try:
        value = json.loads(raw, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"its header is not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise HeaderError("its header is no JSON object")
    if twice:
        raise HeaderError(f"its header has the key {twice[0][:80]} twice")
    return value


def read_index(path: Path) -> dict[str, str]:
    """Key -> file name of an index file (model.safetensors.index.json). Names are names, never paths.

    Raises HeaderError, also for a name that leads elsewhere than into the folder.
    """
    if path.stat().st_size > INDEX_LIMIT:
        raise HeaderError(f"it is larger than {INDEX_LIMIT:,} bytes, which no index is")
    table = read_object(path.read_bytes()).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise HeaderError("it has no weight_map")
    for key, name in table.items():
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\x00" in name:
            raise HeaderError(f"it names {str(name)[:80]!r} for {key[:80]}, which is no name of a file in its folder")
        if not name.endswith(".safetensors"):
            raise HeaderError(f"it names {name[:80]!r} for {key[:80]}, which is no safetensors file")
    return table


def _entry(key: str, value: Any) -> tuple[int, int]:
    """Where a tensor begins and ends in the data. Raises HeaderError unless its length is that of its shape."""
    name = key[:80]
    if len(key) > NAME:
        raise HeaderError(f"a key has {len(key):,} characters")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{name} has not exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise HeaderError(f"{name} has the type {str(dtype)[:20]}, which is none")
    if not _whole(shape) or len(shape) > DIMENSIONS or max(shape, default=0) > LENGTH:
        raise HeaderError(f"{name} has no shape that a tensor can have")
    if not _whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"{name} has no place in the file")
    bits = BITS[dtype]
    for length in shape:
        bits *= length
    if bits != 8 * (offsets[1] - offsets[0]):
        raise HeaderError(f"{name} has {offsets[1] - offsets[0]:,} bytes, {dtype} {shape} needs {bits / 8:,.0f}")
    return offsets[0], offsets[1]


def _whole(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
