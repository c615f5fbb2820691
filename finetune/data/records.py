"""One raw record of a file, parsed, or what is wrong with it before anybody looks at its fields."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from finetune.data.files import LINE_LIMIT, TOO_LONG, Block
from finetune.data.nested import checked, without_nulls

JSON_COLUMNS = ("messages", "conversations", "tools", "choices", "input_ids", "labels")
"""Columns of CSV, Parquet and Arrow files whose cells may hold JSON as a text."""

MESSAGE_COLUMNS = ("prompt", "completion")
"""Columns of the same whose cells hold a text, or messages as JSON: any other JSON there is a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One parsed record, or what is wrong with it."""

    line: int
    """The line of the file that it begins in; its number where files have no lines."""
    sha256: str
    """Hash of its text in the file, or of its values as sorted JSON where a file has no lines."""
    value: Any
    """The parsed value; None with faults."""
    faults: tuple[str, ...] = ()
    """`ID @ what`, where `@` stands for file:line."""
    nth: int = 0
    """Which record of the file it is where its line has another before it, else 0."""
    goes_on: bool = False
    """Whether it is a passage of a text that goes on behind it."""

    @property
    def place(self) -> str:
        """Its line, and which record of the file it is where that does not tell it from others: `1437`, `1:57`."""
        return f"{self.line}:{self.nth}" if self.nth else str(self.line)


def records(block: Block) -> Iterator[Record]:
    """The records of a block, parsed."""
    for line, nth, raw in zip(block.lines, block.nth or [0] * len(block.lines), block.records, strict=True):
        if block.kind == "jsonl":
            record = _parse(line, raw)
            yield replace(record, nth=nth) if nth else record
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
            text, goes_on = json.loads(raw)
            sha256 = hashlib.sha256(text.encode()).hexdigest()
            yield Record(line=line, nth=nth, sha256=sha256, value={"text": text}, goes_on=goes_on)


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
    value, fault = checked(text, "@", "" if raw.endswith(b"\n") else "; the file ends inside this row")
    return wrong(fault) if fault else Record(line=line, sha256=sha256, value=value)


def _valued(line: int, value: dict[str, Any]) -> Record:
    raw = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode()
    return _opened(line, hashlib.sha256(raw).hexdigest(), value)


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
        if cell:
            value[name] = cell
    return _opened(line, sha256, value)


def _opened(line: int, sha256: str, value: dict[str, Any]) -> Record:
    """A row of a table, with values in place of the JSON texts in its cells; each is parsed once."""
    for name, cell in value.items():
        if not isinstance(cell, str) or not cell.startswith(("[", "{")):
            continue
        talks = name in MESSAGE_COLUMNS and '"role"' in cell
        if not talks and name not in JSON_COLUMNS:
            continue
        found, fault = checked(cell, f"@ {name}")
        if talks and not _are_messages(found):
            continue
        if fault:
            return Record(line=line, sha256=sha256, value=None, faults=(fault,))
        value[name] = found
    return Record(line=line, sha256=sha256, value=value)


def _are_messages(value: Any) -> bool:
    """Whether a value is a list of messages, and not some other text that begins as JSON does."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)
