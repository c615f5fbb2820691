"""The elements of a JSON array, read one after the other, so that the file need not fit into memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Protocol

from finetune.data.rows import quoted

PIECE = 2**20
"""Characters that are read at once."""
NEAR = 16
"""An error this close to the end of what was read may be that end: no escape, number part or literal is longer."""

_space = re.compile(r"[^ \t\r\n]|\Z")
_decode = json.JSONDecoder().raw_decode


class Text(Protocol):
    """What gives its next characters."""

    def read(self, size: int, /) -> str:
        """At most `size` characters, none at the end."""


class Elements:
    """The text of each element of the array in `stream`; never more of it in memory than one element and a piece.

    Raises ValueError where it is no array, and for an element that is no JSON or longer than `limit` characters.
    """

    def __init__(self, stream: Text, limit: int) -> None:
        self.stream, self.limit = stream, limit
        self.line = 1
        """Where the last element begins that was given or, where there was an error, that was to be."""

    def __iter__(self) -> Iterator[str]:
        stream, limit = self.stream, self.limit
        text, number, ended = stream.read(PIECE), 0, False
        while _behind_space(text, 0) == len(text) and (more := stream.read(PIECE)):
            self.line += text.count("\n")
            text = more
        at = self._begin(text, 0)
        if text[at : at + 1] != "[":
            raise ValueError(f"it begins with {text[at : at + 1]!r}, expected a list of objects")
        at += 1
        while True:
            at = self._begin(text, at)
            if number == 0 and text[at : at + 1] == "]":
                at += 1
                break
            try:
                _, end = _decode(text, at)
                behind = _behind_space(text, end)
                if behind == len(text) or (not ended and text[behind] not in ",]"):  # a number may go on
                    raise json.JSONDecodeError(_followed(text[behind : behind + 1]), text, behind)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(text) - NEAR
                if ended or not cut:
                    raise ValueError(f"element {number + 1} cannot be read: {error.msg}") from None
                if len(text) - at > limit:
                    raise ValueError(f"element {number + 1} has more than {limit:,} characters") from None
                more = stream.read(max(PIECE, len(text) - at))
                text, at, ended = text[at:] + more, 0, not more
                continue
            except RecursionError:
                raise ValueError(f"element {number + 1} is nested too deeply") from None
            if text[behind] not in ",]":
                raise ValueError(f"element {number + 1} cannot be read: {_followed(text[behind])}")
            number += 1
            yield text[at:end]
            self.line += text.count("\n", at, behind)
            at = behind + 1
            if text[behind] == "]":
                break
        while rest := text[at:].strip(" \t\r\n") or stream.read(PIECE):
            if rest.strip(" \t\r\n"):
                raise ValueError(f"{quoted(rest.strip()[:20])} follows the list")
            text = ""

    def _begin(self, text: str, at: int) -> int:
        """Where what comes next in `text` begins, behind white space."""
        begin = _behind_space(text, at)
        self.line += text.count("\n", at, begin)
        return begin


def one_object(text: str, *, whole: bool) -> tuple[bool, str]:
    """Whether a file of objects begins with one over several lines, and the key under which it has all rows, or "".

    `text` is the file, or where it is not `whole`, its beginning.
    """
    from finetune.data.shape import detect

    text = text.lstrip()
    try:
        value, end = _decode(text)
    except (ValueError, RecursionError):
        return not whole and text.partition("\n")[0].rstrip().endswith(("{", "[", ",")), ""
    alone = isinstance(value, dict) and not text[end:].strip() and not detect(value)
    return "\n" in text[:end], next((key for key in value if _are_rows(value[key])), "") if alone else ""


def _are_rows(value: Any) -> bool:
    """Whether a value is a list of objects, and no turns of a conversation."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and "role" not in first and "from" not in first


def _behind_space(text: str, at: int) -> int:
    found = _space.search(text, at)
    return found.start() if found else len(text)


def _followed(character: str) -> str:
    return f"it is followed by {character!r}, expected a comma" if character else "the file ends inside the list"
