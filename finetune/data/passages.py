"""Plain text cut into passages where paragraphs end, so that a file of any size need not fit into memory."""

from __future__ import annotations

import json
from collections.abc import Iterator

from finetune.data.elements import Text

CHARACTERS = 4
"""Characters of a passage for each token of `data.max_length`: of English a token has a little more."""
SIZE = 8192
"""Characters of a passage where nobody has said how long a row may be."""

_ENDS = ("\n\n", "\r\n\r\n", "\n", ". ", "\u3002", " ")
"""Where a passage ends: at the last paragraph in its second half, else the last line, sentence or word there."""


class Passages:
    """The passages of the text in `stream`, `size` characters at most, as JSON: [passage, whether the text goes on].

    Put together they are the text, but for blank lines before a passage. A text without words has one, an empty one.
    """

    def __init__(self, stream: Text, size: int) -> None:
        self.stream, self.size = stream, size
        self.line = 1
        """Where the last passage begins that was given or, where there was an error, that was to be."""

    def __iter__(self) -> Iterator[str]:
        text, blank = self._filled("")
        self.line += blank
        while True:
            passage = text[: _end(text, self.size)]
            text, blank = self._filled(text[len(passage) :])
            yield json.dumps([passage, bool(text)], ensure_ascii=False)
            self.line += passage.count("\n") + blank
            if not text:
                return

    def _filled(self, text: str) -> tuple[str, int]:
        """(the text without blank lines at its beginning and longer than a passage, if it goes on; their number)."""
        blank = 0
        while True:
            lead = len(text) - len(text.lstrip())
            begin = lead if lead > self.size else text.rfind("\n", 0, lead) + 1
            blank += text.count("\n", 0, begin)
            text = text[begin:]
            if len(text) > self.size or not (more := self.stream.read(self.size)):
                return (text, blank) if text.strip() else ("", 0)
            text += more


def _end(text: str, size: int) -> int:
    if len(text) <= size:
        return len(text)
    found = ((text.rfind(mark, size // 2, size), mark) for mark in _ENDS)
    return next((at + len(mark) for at, mark in found if at >= 0), size)
