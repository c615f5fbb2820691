"""One raw record of a file, parsed, or what is wrong with it before anybody looks at its fields."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune.data.files import LINE_LIMIT, TOO_LONG, Block
from finetune.data.nested import parsed, without_nulls

JSON_COLUMNS = ("messages", "conversations", "tools", "choices", "input_ids", "labels")
"""CSV columns whose cells hold JSON."""

MESSAGE_COLUMNS = ("prompt", "completion")
"""CSV columns whose cells hold a text, or messages as JSON: any other JSON there is a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One parsed record, or what is wrong with it."""

    line: int
    """Its line in the file; its number where files have no lines."""
    sha256: str
    """Hash of its bytes in the file, or of its values as sorted JSON where a file has no lines."""
    value: Any
    """The parsed value; None with faults."""
    faults: tuple[str, ...] = ()
    """`ID @ what`, where `@` stands for file:line."""


def records(block: Block) -> Iterator[Record]:
    """The records of a block, parsed."""
    for line, raw in zip(block.lines, block.records, strict=True):
        if block.kind == "jsonl":
            yield _parse(line, raw)
        elif block.kind == "broken":
            fault = f"DATA-006 @ cannot be read, nor anything behind it: {raw.decode()}"
            yield Record(line=line, sha256=hashlib.sha256(raw).hexdigest(), value=None, faults=(fault,))
        elif block.kind == "csv":
            yield _row_of(line, block.header, raw)
        elif block.kind == "arrow":
            import pyarrow as pa

            with pa.ipc.open_stream(raw) as stream:
                for number, value in enumerate(stream.read_all().to_pylist(), line):
                    yield _valued(number, without_nulls(value))
        else:
            yield _valued(line, json.loads(raw))


def _parse(line: int, raw: bytes) -> Record:
    body = raw.rstrip(b"\r\n")
    sha256 = hashlib.sha256(body).hexdigest()

    def wrong(fault: str) -> Record:
        return Record(line=line, sha256=sha256, value=None, faults=(fault,))

    if b"\x00" in body:
        if TOO_LONG in body:
            size = int(body.rpartition(b" ")[2])
            return wrong(f"DATA-024 @ has {size:,} bytes, expected at most {LINE_LIMIT:,}")
        return wrong(f"DATA-021 @ has a NUL byte at byte {body.index(0)}")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        return wrong(f"DATA-021 @ is not UTF-8 at byte {error.start}")
    if "\ufeff" in text[:1]:
        return wrong("DATA-021 @ begins with a byte order mark: files were joined")
    value, fault = _loaded(text, "@", "" if raw.endswith(b"\n") else "; the file ends inside this row")
    return wrong(fault) if fault else Record(line=line, sha256=sha256, value=value)


def _loaded(text: str, at: str, ends: str = "") -> tuple[Any, str]:
    """The value of a JSON text, or its fault, which names the place `at`; `ends` is added where it is no JSON."""
    twice: list[str] = []
    odd: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) < len(items):
            twice.extend(name for name, count in Counter(name for name, _ in items).items() if count > 1)
        return made

    try:
        value = parsed(text, object_pairs_hook=pairs, parse_constant=odd.append)
    except json.JSONDecodeError as error:
        return None, f"DATA-022 {at} is not JSON: {error.msg} at character {error.pos + 1}{ends}"
    except ValueError:
        return None, f"DATA-022 {at} is not JSON that can be read: nested too deeply, or a number too long"
    if twice:
        return None, f"DATA-023 {at} has the key {twice[0]!r} twice in one object"
    return (None, f"DATA-022 {at} has {odd[0]}, which is not JSON") if odd else (value, "")


def _valued(line: int, value: Any) -> Record:
    raw = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode()
    return Record(line=line, sha256=hashlib.sha256(raw).hexdigest(), value=value)


def _row_of(line: int, header: list[str], raw: bytes) -> Record:
    cells: list[str] = json.loads(raw)
    sha256 = hashlib.sha256(raw).hexdigest()

    def wrong(fault: str) -> Record:
        return Record(line=line, sha256=sha256, value=None, faults=(fault,))

    if len(cells) != len(header):
        return wrong(f"DATA-027 @ has {len(cells)} cells, expected {len(header)} as in the header")
    value: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=True):
        if "\x00" in cell or any("\ud800" <= c <= "\udfff" for c in cell if c > "\ud7ff"):
            return wrong(f"DATA-021 @ {name} " + ("has a NUL byte" if "\x00" in cell else "is not UTF-8"))
        if cell == "":
            continue
        value[name] = cell
        if (name in JSON_COLUMNS and cell[0] in "[{") or (name in MESSAGE_COLUMNS and _are_messages(cell)):
            value[name], fault = _loaded(cell, f"@ {name}")
            if fault:
                return wrong(fault)
    return Record(line=line, sha256=sha256, value=value)


def _are_messages(cell: str) -> bool:
    """Whether a text is a list of messages as JSON."""
    if cell[0] != "[" or '"role"' not in cell:
        return False
    try:
        found = parsed(cell)
    except ValueError:
        return False
    return bool(found) and all(isinstance(m, dict) and "role" in m for m in found)
