"""Items of evaluation files, and how their words and code are compared with those of training rows."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import DataError

RUN = 8
"""Words of a run. Shorter questions are looked for with their choices."""

TEXTS, ANSWERS = ("text", "question", "prompt"), ("answer", "completion", "canonical_solution", "solution")
"""Keys of evaluation files; the first that a record has is used."""

_PLAIN = "".join(chr(i).lower() if chr(i).isalnum() else " " for i in range(128))
_INVISIBLE = re.compile("[\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]+")
_MARKS = "".join(c for c in map(chr, range(0x300, 0x2000)) if unicodedata.category(c)[0] == "M")
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CHARACTER = re.compile(f"[{_UNSPACED}][{_MARKS}]*")
_WORD = re.compile(f"{_CHARACTER.pattern}|[^\\W_{_UNSPACED}]+(?:[{_MARKS}]+[^\\W_{_UNSPACED}]*)*")
# Comments are bounded: each beginning without an end would else be searched to the end of the text.
_TOKEN = re.compile(
    r'''(?P<comment>"""(?:\\.|[^\\]){0,2999}?"""|\'\'\'(?:\\.|[^\\]){0,2999}?\'\'\'|/\*.{0,2999}?\*/|<!--.{0,2999}?-->'''
    r"""|(?<![^\s;{}])\#[^\n]*|(?:^|(?<=[;{},]))[ \t]*//[^\n]*|(?<!\S)--\s[^\n]*|\\\n)"""
    r"""|(?P<string>"[^"\\\n]*(?:\\.[^"\\\n]*)*"|'[^'\\\n]*(?:\\.[^'\\\n]*)*')"""
    r"""|\d+\.\d+|\w+|[=!<>+\-*/%&|^]=|->|=>|\*\*|//|&&|\|\||::|<<|>>|[^\w\s]""",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Item:
    """One question of an evaluation set."""

    id: str
    """What reports call it. It stands in the index as it is, so it must not tell the text."""
    text: str
    """What the model is asked."""
    answer: str = ""
    """What it should say. Looked for from 8 words, or behind a question below 4 words."""


def words(text: str) -> list[str]:
    """The words of a text without case, punctuation, invisible characters and differences of encoding (NFKC).

    In scripts without spaces (Chinese, Japanese, Thai and others) every character is one; it counts as half a word.
    """
    if text.isascii():
        return text.translate(_PLAIN).split()
    text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold()
    return _WORD.findall(unicodedata.normalize("NFKC", text))


def code_tokens(text: str) -> list[str]:
    """The tokens of code in any usual language, without layout, kinds of quotes, comments and triple-quoted strings."""
    found = _TOKEN.finditer(unicodedata.normalize("NFKC", text))
    return [f'"{"".join(m[0][1:-1].split())}"' if m["string"] else m[0] for m in found if not m["comment"]]


def weight(tokens: list[str]) -> float:
    """How many words these are: a character of a script without spaces is half a word."""
    return len(tokens) - sum(1 for word in tokens if word[0] > "\u0dff" and _CHARACTER.match(word)) / 2


def read_items(path: Path) -> list[Item]:
    """The items of an evaluation file, of any kind that training files have. Raises DataError with all faults by line.

    A record has one of TEXTS or `messages` (user turns, last answer); it may have `choices`, an `id` or `task_id`, and
    one of ANSWERS, which may be the letter or the number, from 0, of a choice. Choices join a question below 8 words.
    """
    from finetune.data.files import blocks, sources
    from finetune.data.records import records
    from finetune.data.rows import listed

    items, problems = dict[str, Item](), list[str]()
    (source,) = sources([str(path)])
    for record in (record for block in blocks(source) for record in records(block)):
        made = record.faults[0] if record.faults else _item(record.value, f"{path.name}:{record.place}")
        if isinstance(made, Item) and made.id not in items:
            items[made.id] = made
        else:
            fault = made if isinstance(made, str) else "DATA-002 @ has the id of an earlier item"
            problems.append(fault.replace("@", f"{path}:{record.place}", 1))
    if problems:
        raise listed(problems, f"faults in {path}")
    if not items:
        raise DataError("DATA-006", f"{path} has no items", "it is empty", "another file")
    return list(items.values())


def _item(value: Any, name: str) -> Item | str:
    """The item of one record, or its fault."""
    key = next((key for key in (*TEXTS, "messages") if key in value), "") if isinstance(value, dict) else ""
    if not key:
        return f"DATA-001 @ is {type(value).__name__}, expected an object with {', '.join(TEXTS)} or messages"
    text, answer = value[key], next((value[key] for key in ANSWERS if key in value), "")
    if isinstance(text, list) and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in text):
        answer = text[-1]["content"] if text and text[-1]["role"] == "assistant" else answer
        text = "\n".join(str(m["content"]) for m in text if m["role"] == "user")
    if not isinstance(text, str):
        return f"DATA-001 @ {key} is {type(text).__name__}, expected str or list of messages with role and content"
    if not words(text) and not code_tokens(text):
        return f"DATA-003 @ {key} is empty"
    choices = value["choices"] if "choices" in value else []
    if isinstance(choices, dict):
        choices = choices["text"] if "text" in choices else list(choices.values())
    if not isinstance(choices, list) or not isinstance(answer, str | int | float | None):
        return "DATA-001 @ has an answer that is no text, or choices that are no list"
    named: dict[Any, Any] = dict(enumerate(choices)) | dict(zip("ABCDEFGHIJ", choices, strict=False))
    answer = named[answer] if answer in named else "" if answer is None else answer
    text = "\n".join(map(str, [text, *choices])) if len(words(text)) < RUN else text
    return Item(str(next((value[key] for key in ("id", "task_id") if key in value), name)), text, str(answer))
