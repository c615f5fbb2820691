"""What is looked at in the words of a good row: filters, personal data, quality, items of evaluation sets."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from finetune.data.nested import leaves
from finetune.data.rows import Row
from finetune.errors import DataError
from finetune.recipe import Data


class Cleaner:
    """Looks at rows one by one, as the settings say."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.indexes = None
        if data.benchmarks:
            from finetune.data.contamination import Indexes, load

            loaded = [load(Path(path).expanduser()) for path in data.benchmarks]
            names = [index.name for index in loaded]
            if twice := next((name for name in names if names.count(name) > 1), ""):
                why = "hits are told by the name, and each has its own policy"
                fix = "data index file=FILE name=ANOTHER"
                raise DataError("DATA-020", f"two indexes of data.benchmarks are called {twice}", why, fix)
            self.indexes = Indexes(loaded)

    def load(self) -> None:
        """Loads what the first row that needs it would load, so that processes that are forked have it."""
        if self.data.languages:
            from finetune.data.quality import language

            language("A sentence that is long enough.")
        if self.data.privacy != "off":
            from finetune.data.credentials import load
            from finetune.data.privacy import find

            load()
            find("Call +44 20 7946 0999.")

    def clean(self, row: Row, fact: dict[str, Any]) -> None:
        """Looks at the words of a good row; may drop or redact it."""
        data = self.data
        text = "\n".join(texts(row))
        if not text:
            return
        if data.min_words and len(text.split()) < data.min_words:
            row.code, row.why = "short", f"{len(text.split())} words, data.min_words={data.min_words}"
            return
        if data.languages:
            from finetune.data.quality import language

            fact["language"] = language(text)
            if fact["language"] not in data.languages:
                seen = fact["language"] or "no language that is known"
                row.code, row.why = "language", f"it is in {seen}, data.languages has {', '.join(data.languages)}"
                return
        if data.privacy != "off":
            self._private(row, fact, text)
        if data.quality != "off" and not row.code:
            from finetune.data.quality import flags

            found = flags(texts(row)[-1])
            fact["flags"] = ",".join(found)
            if found and data.quality == "drop":
                row.code, row.why = "quality", ", ".join(found)
        if self.indexes is not None and row.split != "heldout" and not row.code:
            self._contaminated(row, fact, text)

    def _private(self, row: Row, fact: dict[str, Any], text: str) -> None:
        from finetune.data.privacy import find, redact

        found, besides = find(text), _besides(row)
        every = found + ([one for beside in besides for one in find(beside)] if _has_any("\n".join(besides)) else [])
        if not every:
            return
        kinds = sorted({f.kind for f in every})
        fact["privacy"] = ",".join(f.kind for f in every)
        if self.data.privacy == "drop":
            row.code, row.why = "privacy", f"it has {', '.join(kinds)}"
        elif self.data.privacy == "redact" and row.input_ids:
            row.code, row.why = "privacy", f"it has {', '.join(kinds)}, and tokens cannot be redacted"
        elif self.data.privacy == "redact":
            if row.text:
                row.text = redact(text, found)
            for message in row.messages:
                for key in ("content", "reasoning", "name", "tool_calls"):
                    if key in message:
                        message[key] = _redacted(message[key])
            row.tools = _redacted(row.tools)
            row.choices = [redact(choice, find(choice)) for choice in row.choices]

    def _contaminated(self, row: Row, fact: dict[str, Any], text: str) -> None:
        assert self.indexes is not None
        hits = self.indexes.hits(text)
        if not hits:
            return
        fact["benchmarks"] = json.dumps(
            [[name, hit.item, hit.how, hit.length, round(hit.share, 3)] for name, hit in hits]
        )
        policies = dict(zip((index.name for index in self.indexes.indexes), self.data.benchmarks.values(), strict=True))
        worst = [(policies[name], name, hit) for name, hit in hits]
        for policy, code in (("fail", "DATA-014"), ("drop", "benchmark")):
            name, hit = next(((n, h) for p, n, h in worst if p == policy), ("", None))
            if hit is not None:
                row.code, row.why = code, f"it contains item {hit.item} of {name} ({hit.how}, {hit.length})"
                return


def texts(row: Row) -> list[str]:
    """The words of a row, message by message; of one that came as tokens what they were decoded to."""
    if row.messages:
        found = []
        for m in row.messages:
            calls = json.dumps(m["tool_calls"], ensure_ascii=False) if "tool_calls" in m else ""
            found.append("\n".join(t for t in (m["reasoning"] if "reasoning" in m else "", m["content"], calls) if t))
        return found
    return [row.text] if row.text else row.decoded


@lru_cache(maxsize=256)
def _has_any(text: str) -> bool:
    """Whether there are personal data or secrets in a text that many rows have, such as the schemas of their tools."""
    from finetune.data.privacy import find

    return bool(find(text))


def _besides(row: Row) -> list[str]:
    """What templates write beside the words of a row: the names of those who speak, the schemas of its functions."""
    names = [message["name"] for message in row.messages if "name" in message]
    return names + [leaf for leaf in leaves(row.tools) if isinstance(leaf, str)]


def _redacted(value: Any) -> Any:
    from finetune.data.privacy import find, redact

    if isinstance(value, str):
        return redact(value, find(value))
    if isinstance(value, dict):
        return {_redacted(name): _redacted(item) for name, item in value.items()}
    return [_redacted(item) for item in value] if isinstance(value, list) else value
