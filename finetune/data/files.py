"""Input files of every format, read as blocks of raw records, so that none has to fit into memory.

The parent process cuts files into blocks, which `mapping.py` hands to `datasets` as its rows; `records.py` parses one,
wherever it was sent. Nothing is judged here but the file itself: what a row must look like is said in `shape.py`.

The builders that `datasets` has for these formats are not used. Those of JSON and CSV guess types before anyone has
seen a record, and name no line; the one of text ends lines at U+2028. Those of Parquet and Arrow refuse types that we
read (dictionaries, maps), copy whole files, and trust their offsets: a damaged file would end the process.
"""

from __future__ import annotations

import csv
import dataclasses
import glob
import io
import json
import re
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.elements import Elements, one_object
from finetune.data.passages import SIZE, Passages
from finetune.data.squeezed import SQUEEZED, opened
from finetune.errors import DataError

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
}
"""Suffix -> how a file is read. `.gz` and `.zst` behind it are taken off first."""

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
"""How an address begins: https://, hf:///, s3://, file:/."""

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

LINE_LIMIT = 16 * 2**20
"""Bytes of the longest record that is read."""
TOO_LONG = b"\x00too long: "
"""Stands, with its length, for the rest of a record that was not read."""
UNREADABLE = (
    *(OSError, EOFError, ValueError, csv.Error, zlib.error),  # gzip's errors and those of Unicode among them
    *(NotImplementedError, LookupError, TypeError, MemoryError),  # Arrow's own kinds of these
)
"""What reading a file raises where it is not what it seems to be."""
BLOCK_ROWS = 1000
BLOCK_BYTES = 4 * 2**20
"""A block ends at the first of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One input file."""

    path: Path
    """Where it is."""
    name: str
    """What messages and the ledger call it."""
    kind: str
    """One of the values of KINDS."""
    squeezed: str
    """`gzip`, `zstd` or empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some records of one file, still raw. Small enough to be sent to another process."""

    file: str
    """Name of the file."""
    kind: str
    """What a record is. `jsonl`: the bytes of a line; `csv`: its cells as JSON; `arrow`: many records, as an Arrow
    stream; `passages`: one of a text, as JSON; `rows`: a row of a card as JSON (`part.py`); `broken`: why all that
    follows in the file cannot be read."""
    lines: list[int]
    """Line (or number) of each record; of the first one where a record is many."""
    records: list[bytes]
    """The records themselves."""
    header: list[str] = dataclasses.field(default_factory=list)
    """Names of the columns of `csv`."""
    nth: list[int] = dataclasses.field(default_factory=list)
    """Which one of the file a record is where its line has another before it, else 0. Empty: there is none such."""


def sources(patterns: list[str]) -> list[Source]:
    """The files that paths, folders and globs name, in a fixed order, each once. Raises DataError DATA-006."""
    found: dict[Path, Source] = {}
    for pattern in patterns:
        if URL.match(pattern):
            why = "rows are read from disk only, and nothing is fetched by address"
            raise DataError("DATA-006", f"{pattern} is an address", why, "a file or folder on this machine")
        paths = _expand(pattern)
        if not paths:
            why = f"files end in {', '.join(KINDS)}, also with .gz or .zst"
            raise DataError("DATA-006", f"{pattern} names no file", why, "a file, a folder")
        for path in paths:
            suffixes = [s.lower() for s in path.suffixes]
            squeezed = SQUEEZED[suffixes[-1]] if suffixes and suffixes[-1] in SQUEEZED else ""
            suffix = (suffixes[:-1] if squeezed else suffixes)[-1:] or [""]
            if suffix[0] not in KINDS:
                raise DataError(
                    "DATA-006",
                    f"{path} has an unknown kind",
                    f"files end in {', '.join(KINDS)}",
                    "rename or convert it",
                )
            found.setdefault(
                path.resolve(), Source(path=path, name=path.name, kind=KINDS[suffix[0]], squeezed=squeezed)
            )
    return [dataclasses.replace(source, name=_name(source.path, list(found))) for source in found.values()]


def named(entries: list[str], every: list[Source]) -> dict[str, list[str]]:
    """Entry -> the names that its files have among `every`, in their order; none for a file that is not among them.

    A name is as long as it takes to tell a file from all others, so an entry by itself would give shorter ones.
    """
    found = {entry: {source.path.resolve() for source in sources([entry])} for entry in entries}
    return {entry: [s.name for s in every if s.path.resolve() in paths] for entry, paths in found.items()}


def _name(path: Path, every: list[Path]) -> str:
    """As much of the end of a path as tells it from the others: names do not depend on where the data lie."""
    parts = path.resolve().parts
    for count in range(1, len(parts)):
        if sum(other.parts[-count:] == parts[-count:] for other in every) == 1:
            return "/".join(parts[-count:])
    return str(path)


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        saved = {"dataset_info.json", "state.json"} if (path / "state.json").is_file() else set()
        every = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        return [inside(p, path) for p in every if p.name not in saved and _known(p)]
    found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207  # Path.glob takes no absolute pattern
    return [Path(p) for p in found if Path(p).is_file()]


def inside(path: Path, folder: Path) -> Path:
    """A file of a folder. Raises DataError DATA-029 when it, by a link or by its name, lies elsewhere.

    Whoever names a folder means what is in it; what a file that is named itself links to is that person's own choice.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        what, why = f"{path} leads out of {folder}", "a folder of rows may not bring in files from elsewhere"
        raise DataError("DATA-029", what, why, "the file itself in that folder, or its own path in data.train_files")
    return path


def _known(path: Path) -> bool:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in SQUEEZED:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in KINDS


def blocks(source: Source, passage: int = SIZE) -> Iterator[Block]:
    """The records of a file in blocks; where it breaks off, one of the kind `broken` follows what came before.

    `passage`: characters of a record of plain text, at most. Raises DataError DATA-006 for a file of which nothing can
    be read, and where the machine fails, not the file.
    """
    last: Block | None = None
    reader = {"jsonl": _lines, "json": _json, "csv": _cells, "parquet": _parquet, "arrow": _arrow}
    reader["text"] = lambda source: _texts(source, "passages", lambda stream: Passages(stream, passage))
    try:
        for block in reader[source.kind](source):
            yield block
            last = block
    except UNREADABLE as error:
        cause = error.__cause__ if isinstance(error, _BrokenOff) else error
        machine = isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno is not None)
        if last is None or machine:
            where = f" behind line {last.lines[-1]}" if last else ""
            what = f"{source.name} cannot be read{where}"
            raise DataError("DATA-006", what, _why(error), "a whole file of this kind") from None
        line = error.line if isinstance(error, _BrokenOff) else _behind(last)
        yield Block(file=source.name, kind="broken", lines=[line], records=[_why(error).encode()])


class _BrokenOff(ValueError):
    """What ends a file too early, and the line, or the number, of the record that it ends in."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line = line


def _why(error: Exception) -> str:
    """What is wrong with a file, on one line."""
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(told.split())[:200] or type(error).__name__


def _behind(block: Block) -> int:
    """The number of the record behind a block."""
    if block.kind != "arrow":
        return block.lines[-1] + 1
    import pyarrow as pa

    with pa.ipc.open_stream(block.records[-1]) as stream:
        return block.lines[-1] + int(stream.read_all().num_rows)


def _lines(source: Source) -> Iterator[Block]:
    """The lines of a file that are not blank."""
    yield from _filled(source, "jsonl", _numbered(source))


def _numbered(source: Source) -> Iterator[tuple[int, bytes]]:
    number = 0
    with opened(source.path, source.squeezed) as handle:
        while raw := handle.readline(LINE_LIMIT + 1):
            number += 1
            if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise ValueError("it is UTF-16; save it as UTF-8")
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if len(raw) > LINE_LIMIT:
                raw = _skip(handle, raw)
            if raw.strip():
                yield number, raw


def _filled(
    source: Source, kind: str, records: Iterable[tuple[int, bytes]], header: list[str] | None = None
) -> Iterator[Block]:
    """Blocks of numbered records, each as large as a block may be; what came before an error is handed on first."""

    def empty() -> Block:
        return Block(file=source.name, kind=kind, lines=[], records=[], header=[] if header is None else header)

    block, size, last = empty(), 0, 0
    try:
        for nth, (line, raw) in enumerate(records, 1):
            block.lines.append(line)
            block.records.append(raw)
            block.nth.append(nth if line == last else 0)
            last = line
            size += len(raw)
            if len(block.lines) == BLOCK_ROWS or size >= BLOCK_BYTES:
                yield block
                block, size = empty(), 0
    except UNREADABLE:
        if block.lines:
            yield block
        raise
    if block.lines:
        yield block


def _skip(handle: Any, raw: bytes) -> bytes:
    """Reads on to the end of a line that is too long; its first bytes stand for it."""
    length = len(raw)
    while raw[-1:] != b"\n" and (more := handle.readline(LINE_LIMIT)):
        length += len(more)
        if more[-1:] == b"\n":
            break
    return raw[:64] + TOO_LONG + str(length).encode()


def _json(source: Source) -> Iterator[Block]:
    """The elements of a JSON array, one after the other; a file of objects, one a line, is read as such."""
    with opened(source.path, source.squeezed) as handle:
        head = handle.read1(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head[:1] == b"{":
        _refuse_one_object(source)
        yield from _lines(source)
        return
    yield from _texts(source, "jsonl", lambda stream: Elements(stream, LINE_LIMIT))


def _refuse_one_object(source: Source) -> None:
    """DATA-006 where a file is no list and has no row a line: an object over several lines, or one with all rows."""
    try:
        with opened(source.path, source.squeezed) as handle:
            raw = handle.read(LINE_LIMIT)
    except UNREADABLE:  # which is said where it breaks off
        return
    several, inside = one_object(raw.decode("utf-8-sig", "ignore"), whole=len(raw) < LINE_LIMIT)
    why, file = "a .json file is a list of rows, or has one row on each line", shlex.quote(str(source.path))
    if inside:
        fix = f"jq -c '.{inside}[]' {file} > rows.jsonl" if _PLAIN.fullmatch(inside) else "a file of that list"
        raise DataError("DATA-006", f"{source.name} is one object with its rows under {inside!r}", why, fix)
    if several:
        fix = f"jq -c . {file} > rows.jsonl"
        raise DataError("DATA-006", f"{source.name} begins with an object over several lines", why, fix)


def _texts(source: Source, kind: str, reader: Callable[[Any], Elements | Passages]) -> Iterator[Block]:
    """What a reader of text finds in a file."""
    with opened(source.path, source.squeezed) as handle:
        found = reader(io.TextIOWrapper(handle, "utf-8-sig", newline=""))
        yield from _filled(source, kind, _begun(found))


def _begun(found: Elements | Passages) -> Iterator[tuple[int, bytes]]:
    """What is found, with the line that it begins in."""
    try:
        for text in found:
            yield found.line, text.encode()
    except UNREADABLE as error:
        raise _BrokenOff(found.line, _why(error)) from error


def _cells(source: Source) -> Iterator[Block]:
    header: list[str] = []  # filled when the first record is read
    yield from _filled(source, "csv", _table(source, header), header)


def _table(source: Source, header: list[str]) -> Iterator[tuple[int, bytes]]:
    """The cells of each record that is not blank, with the line that it begins in; puts the names into `header`."""
    csv.field_size_limit(LINE_LIMIT)
    start = 1
    try:
        with opened(source.path, source.squeezed) as handle:
            text = io.TextIOWrapper(handle, encoding="utf-8-sig", errors="surrogateescape", newline="")
            reader = csv.reader(text, strict=True, delimiter="\t" if ".tsv" in source.path.name else ",")
            header += next(reader, [])
            if any("\ud800" <= c <= "\udfff" for name in header for c in name):
                raise ValueError("its header is not UTF-8")
            double = [name for i, name in enumerate(header) if name in header[:i]]
            if double or not header:
                raise ValueError(f"its header names {double[0]!r} twice" if double else "it has no header")
            start = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield start, json.dumps(cells, ensure_ascii=True).encode()
                start = reader.line_num + 1
    except UNREADABLE as error:
        raise _BrokenOff(start, _why(error)) from error


def _parquet(source: Source) -> Iterator[Block]:
    from pyarrow import parquet

    number = 1
    with parquet.ParquetFile(source.path) as file:
        for batch in map(_sound, file.iter_batches(batch_size=BLOCK_ROWS)):
            yield Block(file=source.name, kind="arrow", lines=[number], records=[_ipc(batch)])
            number += batch.num_rows


def _arrow(source: Source) -> Iterator[Block]:
    import pyarrow as pa

    number = 1
    with pa.memory_map(str(source.path)) as handle:
        for batch in map(_sound, _batches(handle)):
            for start in range(0, batch.num_rows, BLOCK_ROWS):
                part = batch.slice(start, BLOCK_ROWS)
                yield Block(file=source.name, kind="arrow", lines=[number], records=[_ipc(part)])
                number += part.num_rows


def _batches(handle: Any) -> Iterator[Any]:
    import pyarrow as pa

    try:
        yield from pa.ipc.open_stream(handle)
    except pa.ArrowInvalid:
        file = pa.ipc.open_file(handle)
        for i in range(file.num_record_batches):
            yield file.get_batch(i)


def _sound(batch: Any) -> Any:
    """The batch, looked at whole: Arrow trusts a file's offsets, and false ones end the process, or read beyond it."""
    batch.validate(full=True)  # texts that are no UTF-8, too
    fields = list(batch.schema)
    for field in fields:  # with those inside of it
        field.name.encode()  # raises for a name that is no UTF-8, which Arrow lets pass
        fields += [field.type.field(i) for i in range(field.type.num_fields)]
    return batch


def _ipc(batch: Any) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return bytes(sink.getvalue())
