"""Tool calls as chat templates write them: what they may be given, and whether a text has every one of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from finetune.data.nested import leaves


def as_json(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose calls have their arguments as JSON text."""
    made = []
    for m in messages:
        if "tool_calls" in m:
            calls = [
                call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
                for call in m["tool_calls"]
            ]
            m = m | {"tool_calls": calls}
        made.append(m)
    return made


def lost(calls: list[dict[str, Any]], text: str) -> str:
    """What of the calls is not in the text, or an empty text: a template may leave out a null, and nothing else."""
    narrow = bare(text)

    def stands(part: str) -> bool:
        return part in text or bare(part) in narrow

    for call in calls:
        function = call["function"]
        if not stands(function["name"]):
            return "the name of a call"
        for leaf in leaves(function["arguments"]):
            if leaf is not None and not any(map(stands, _wordings(leaf))):
                return "an argument of a call"
    return ""


def bare(text: str) -> str:
    """Without white space: templates differ in how they space."""
    return "".join(text.split())


def _wordings(leaf: Any) -> Iterator[str]:
    """How a value may stand in a call: plain, as JSON, as JSON inside JSON, and as Python writes it."""
    if not isinstance(leaf, str):
        yield from (json.dumps(leaf), str(leaf))
        return
    yield leaf
    for ascii_only in (False, True):
        once = json.dumps(leaf, ensure_ascii=ascii_only)[1:-1]
        yield once
        yield json.dumps(once, ensure_ascii=ascii_only)[1:-1]
    yield repr(leaf)[1:-1]
