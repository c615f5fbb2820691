"""A row on its way to a model, and the error that names the faults of many."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.errors import DataError

SHOWN = 20
"""Problems that one error message spells out; all are counted."""


SHOW_ROWS = "FINETUNE_SHOW_ROWS"
"""Variable that --show-rows sets, for this process and those it starts: errors may repeat words of rows."""


NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
"""How a number is written by whoever has read it from a file."""

_OPENING = "\"'\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb\u00a1\u00bf"
_CLOSING = ".,;:!?\u2026\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f" + _OPENING  # those of full width among them


def quoted(text: str) -> str:
    """Words of a row as an error may say them: their number and hash, with --show-rows the words themselves."""
    if os.environ.get(SHOW_ROWS) == "1":
        return repr(text)
    return (
        f"({len(text):,} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}; --show-rows shows them)"
    )


@dataclass(slots=True, kw_only=True)
class Row:
    """One row from a file: first as the reader found it, later as a conversation, at last with its verdict."""

    file: str
    """File it came from, as the user knows it."""
    line: int
    """Line of that file in which it begins, from 1; the number of the record where files have no lines."""
    id: str
    """Unique name of the row."""
    sha256: str
    """Hash of the row as it stood in the file."""
    fields: dict[str, str] = field(default_factory=dict)
    """What a card's reader found; empty for rows that came as messages."""
    part: int = 1
    """1, or 2, 3 ... for a further excerpt of the same text, which can only train."""
    group: str = ""
    """Rows of one group stand on one side of the split."""
    label: str = ""
    """The row's class; empty when answers are free text."""
    time: str = ""
    """When it is from, where the split goes by time."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The conversation; the last message is the assistant's. Empty for plain text and for tokens."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """Functions that the assistant may call, as JSON schemas."""
    nth: int = 0
    """Which row of the file it is where its line has another before it, else 0."""
    text: str = ""
    """Plain text to continue pre-training on, instead of a conversation."""
    goes_on: bool = False
    """Whether that text is a passage of a longer one, which goes on behind it."""
    input_ids: list[int] = field(default_factory=list)
    """Tokens that the user made, instead of a conversation."""
    labels: list[int] = field(default_factory=list)
    """Their labels, -100 where nothing is learnt."""
    decoded: list[str] = field(default_factory=list)
    """What these tokens say, for the checks of words alone: before the first trained one, and from it on."""
    ignored: list[str] = field(default_factory=list)
    """Columns of the file that have no meaning here."""
    choices: list[str] = field(default_factory=list)
    """All possible answers; empty when answers are free text."""
    split: str = ""
    """`train` or `heldout` once the split is made."""
    place: int = -1
    """Its place in the order of training, where a card decides it."""
    code: str = ""
    """Why the row was dropped: one word, or the id of its fault; empty while it is kept."""
    why: str = ""
    """The same in a sentence."""

    def drop(self, code: str, why: str) -> None:
        """Marks the row as dropped; it keeps its line in the ledger."""
        self.code, self.why, self.split = code, why, ""

    @property
    def where(self) -> str:
        """`file:line`, as error messages name the row."""
        return where(self.file, self.line, self.nth)


def where(file: str, line: int, nth: int) -> str:
    """`file:line`, and which row of the file it is where that line has one before it: `file:line:nth`."""
    return f"{file}:{line}:{nth}" if nth else f"{file}:{line}"


def read_messages(path: Path) -> list[Row]:
    """The rows of a small JSONL file of conversations. Raises DataError with all faults, the first 20 in full.

    A row may also have `id`, `group` (rows of one group are never split) and `choices` (all possible answers).
    """
    from finetune.data.files import blocks, sources
    from finetune.data.records import records
    from finetune.data.shape import conversation, grouped

    rows, problems = [], []
    seen: dict[str, Row] = {}
    (source,) = sources([str(path)])
    for record in (record for block in blocks(source) for record in records(block)):
        row = Row(file=str(path), line=record.line, id=f"{path.name}:{record.place}", sha256=record.sha256)
        row.nth = record.nth
        faults = (
            list(record.faults) or conversation(row, record.value, "messages") or grouped(row, record.value, "", "")
        )
        if not faults and row.id in seen:
            faults = [f"DATA-002 @ has the id of line {seen[row.id].line}"]
        row.group = row.group or ("" if faults else prompt_key(row))
        problems += [fault.replace("@", row.where, 1) for fault in faults]
        seen.setdefault(row.id, row)
        rows += [] if faults else [row]
    if problems:
        raise listed(problems, f"faults in {path}")
    if not rows:
        raise DataError("DATA-006", f"{path} has no rows", "every line must be a JSON object", "another file")
    return rows


def listed(problems: list[str], title: str) -> DataError:
    """One error for many problems: the count, and the first 20 in full. Its id is that of the first."""
    code, _, first = problems[0].partition(" ")
    more = [f"  {p}" for p in problems[1:SHOWN]]
    if len(problems) > SHOWN:
        more.append(f"  and {len(problems) - SHOWN} more")
    return DataError(code, "\n".join([f"{len(problems)} {title}:", f"  {code} {first}", *more]))


def prompt_key(row: Row) -> str:
    """Hash of everything before the last answer as `plain` has it, less the system message: equal keys, one question.

    Plain text and tokens have no question; theirs is the hash of everything.
    """
    if row.messages:
        return list(prompt_keys(row).values())[-1]
    return hashlib.sha256((plain(row.text) or repr(row.input_ids)).encode()).hexdigest()


def prompt_keys(row: Row) -> dict[int, str]:
    """Place of each answer in a conversation -> hash of everything before it, as in `prompt_key`."""
    told, keys = hashlib.sha256(), {}
    for i, message in enumerate(row.messages):
        if message["role"] == "assistant":
            keys[i] = told.hexdigest()
        if message["role"] != "system" and i < len(row.messages) - 1:
            told.update(f"{message['role']}:{plain(message['content'])}\n".encode())
    return keys


def plain(text: str) -> str:
    """The text without case, spacing and punctuation at the ends of its words: signs between words may be the question.

    A text of nothing but punctuation keeps it.
    """
    words = text.lower().split()
    return " ".join(filter(None, [word.lstrip(_OPENING).rstrip(_CLOSING) for word in words])) or " ".join(words)


def moment(text: str, *, years: bool) -> float | None:
    """A date or number as what times are ordered by: seconds, or the number. None where it is neither.

    A date may end behind its year or month, and is UTC where it names no zone. `years`: whether a number of four digits
    is a year.
    """
    if NUMBER.fullmatch(text) and not (years and re.fullmatch(r"\d{4}", text)):
        return float(text)
    try:
        found = datetime.fromisoformat(f"{text}-01-01"[:10] if len(text) < 10 else text)
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
