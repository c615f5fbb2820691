"""A row on its way to a model, and the reader of users' own JSONL files, which names every fault by file and line."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import DataError

SHOWN = 20
"""Problems that one error message spells out; all are counted."""

ROLES = ("system", "user", "assistant")
KEYS = ("messages", "id", "group", "choices")


@dataclass(slots=True, kw_only=True)
class Row:
    """One row from a file: first as the reader found it, later as a conversation, at last with its verdict."""

    file: str
    """File it came from, as the user knows it."""
    line: int
    """Line in that file, from 1; the number of the record where files have no lines."""
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
    messages: list[dict[str, str]] = field(default_factory=list)
    """The conversation; the last message is the assistant's."""
    choices: list[str] = field(default_factory=list)
    """All possible answers; empty when answers are free text."""
    split: str = ""
    """`train` or `heldout` once the split is made."""
    code: str = ""
    """Why the row was dropped, in one word; empty while it is kept."""
    why: str = ""
    """The same in a sentence."""

    def drop(self, code: str, why: str) -> None:
        """Marks the row as dropped; it keeps its line in the ledger."""
        self.code, self.why, self.split = code, why, ""

    @property
    def where(self) -> str:
        """`file:line`, as error messages name the row."""
        return f"{self.file}:{self.line}"


def read_messages(path: Path) -> list[Row]:
    """The rows of a JSONL file with a `messages` list per line. Raises DataError with all faults, the first 20 in full.

    A row may also have `id`, `group` (rows of one group are never split) and `choices` (all possible answers).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            "DATA-006", f"{path} cannot be read", error.strerror or str(error), "give the path of a JSONL file"
        ) from None
    rows, problems = [], []
    for number, raw in enumerate(data.split(b"\n"), 1):
        if not raw.strip():
            continue
        value, faults = _parse(raw)
        problems += [fault.replace("@", f"{path}:{number}", 1) for fault in faults]
        if not faults:
            rows.append(_row(path, number, raw, value))
    seen: dict[str, Row] = {}
    for row in rows:
        if row.id in seen:
            problems.append(f"DATA-002 {row.where} id={row.id} is also the id of {seen[row.id].where}")
        seen[row.id] = row
    if problems:
        raise listed(problems, f"faults in {path}")
    if not rows:
        raise DataError(
            "DATA-006", f"{path} has no rows", "every line must be a JSON object with messages", "another file"
        )
    return rows


def listed(problems: list[str], title: str) -> DataError:
    """One error for many problems: the count, and the first 20 in full. Its id is that of the first."""
    code, _, first = problems[0].partition(" ")
    more = [f"  {p}" for p in problems[1:SHOWN]]
    if len(problems) > SHOWN:
        more.append(f"  and {len(problems) - SHOWN} more")
    return DataError(code, "\n".join([f"{len(problems)} {title}:", f"  {code} {first}", *more]))


def prompt_key(row: Row) -> str:
    """Hash of everything before the last answer, without case and spacing: equal keys mean the same question."""
    text = "\n".join(f"{m['role']}:{' '.join(m['content'].lower().split())}" for m in row.messages[:-1])
    return hashlib.sha256(text.encode()).hexdigest()


def _row(path: Path, number: int, raw: bytes, value: dict[str, Any]) -> Row:
    choices = value["choices"] if "choices" in value else []
    row = Row(
        file=str(path),
        line=number,
        id=str(value["id"]) if "id" in value else f"{path.name}:{number}",
        sha256=hashlib.sha256(raw).hexdigest(),
        messages=[{"role": m["role"], "content": m["content"]} for m in value["messages"]],
        choices=choices,
        label=value["messages"][-1]["content"] if choices else "",
    )
    row.group = str(value["group"]) if "group" in value else prompt_key(row)
    return row


def _parse(raw: bytes) -> tuple[Any, list[str]]:
    """The value of one line and its faults; `@` in a fault stands for file:line."""
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, [f"DATA-001 @ is not UTF-8 at byte {error.start}"]
    except (json.JSONDecodeError, RecursionError) as error:
        return None, [f"DATA-001 @ is not JSON: {error}"]
    if not isinstance(value, dict):
        return None, [f'DATA-001 @ is {_kind(value)}, expected an object like {{"messages": [...]}}']
    faults = [f"DATA-002 @ has the unknown key {key!r}, known: {', '.join(KEYS)}" for key in value if key not in KEYS]
    for key in ("id", "group"):
        if key in value and (
            not isinstance(value[key], (str, int)) or isinstance(value[key], bool) or value[key] == ""
        ):
            faults.append(f"DATA-002 @ {key} is {_kind(value[key])}, expected a text or number")
    if not isinstance(value.get("messages"), list) or not value["messages"]:
        return value, [*faults, f"DATA-002 @ messages is {_kind(value.get('messages'))}, expected a list with messages"]
    faults += _message_faults(value["messages"])
    if "choices" in value:
        faults += _choice_faults(value)
    return value, faults


def _message_faults(messages: list[Any]) -> list[str]:
    faults: list[str] = []
    roles: list[str] = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            faults.append(f"DATA-002 @ messages[{i}] is {_kind(message)}, expected an object with role and content")
            continue
        unknown = sorted(set(message) - {"role", "content"})
        if unknown:
            faults.append(f"DATA-002 @ messages[{i}] has the unknown key {unknown[0]!r}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            faults.append(f"DATA-002 @ messages[{i}].role is {role!r}, expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            faults.append(f"DATA-002 @ messages[{i}].content is {_kind(content)}, expected a text")
        elif not content.strip():
            faults.append(f"DATA-003 @ messages[{i}].content is empty")
        roles.append(str(role))
    if faults:
        return faults
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or turns[-1] != "assistant":
        faults.append("DATA-003 @ has no assistant message at its end, so there is nothing to learn from it")
    if turns != ["user", "assistant"] * (len(turns) // 2) and not faults:
        faults.append(
            f"DATA-004 @ roles must alternate user, assistant after an optional system message, not {', '.join(roles)}"
        )
    return faults


def _choice_faults(value: dict[str, Any]) -> list[str]:
    choices = value["choices"]
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        return [f"DATA-002 @ choices is {_kind(choices)}, expected a list of texts"]
    last = value["messages"][-1]
    answer = last.get("content") if isinstance(last, dict) else None
    if choices and answer not in choices:
        return [f"DATA-010 @ the answer {answer!r} is not one of its choices {choices}"]
    return []


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return ("an empty " + names[type(value)].split()[-1]) if value in ("", [], {}) else names[type(value)]
