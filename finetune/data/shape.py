"""What a row must look like: the formats there are, how each becomes a conversation, and every fault it can have.

A fault is `ID @ field is this, expected that`; `@` stands for file:line. Values never stand in a fault, only their
types, keys and roles, so that messages can be shown to anybody.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from finetune.data.messages import message, order, tools_of, type_name
from finetune.data.nested import checked
from finetune.data.rows import NUMBER, Row, moment

FORMATS = {
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "prompt_completion": ("prompt", "completion", "system"),
    "text": ("text",),
    "tokens": ("input_ids", "labels"),
}
"""Format -> its keys, the one that gives it away first. `messages` is OpenAI's, with tools and tool calls."""

OWN = ("id", "group", "choices")
"""Keys that every format may have beside its own."""

SHORT = 4
"""Letters from which an unknown key may be one of ours misspelt: idx, uid and qid are columns of their own."""

SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""`from` of a ShareGPT turn -> role."""


def detect(value: dict[str, Any]) -> str:
    """The format that a row is in by its keys; empty when by none."""
    if "instruction" in value and "output" in value:
        return "alpaca"
    return next((name for name, keys in FORMATS.items() if name != "alpaca" and keys[0] in value), "")


def renamed(value: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The row with the user's column names replaced by ours."""
    return {columns[key] if key in columns else key: item for key, item in value.items()} if columns else value


def usual(values: list[dict[str, Any]]) -> list[str]:
    """Columns that more than half of some rows have, and two at least: a file's own, whatever they are called."""
    counts = Counter(key for value in values for key in value)
    return [key for key, count in counts.items() if count > max(1, len(values) / 2)]


def conversation(row: Row, value: Any, kind: str, extra: Sequence[str] = (), usual: Sequence[str] = ()) -> list[str]:
    """Fills `row` from a parsed record of the format `kind`; the faults that it has, empty when it is a good row.

    `extra` are columns that settings name (`data.group_by`, `data.time_by`). `usual` are those that rows of the file
    mostly have: none of them is one of ours misspelt.
    """
    if not isinstance(value, dict):
        return [f"DATA-001 @ is {type_name(value)}, expected an object such as {{{FORMATS[kind][0]!r}: ...}}"]
    keys = (*FORMATS[kind], *OWN)
    if kind != "alpaca" and keys[0] not in value:
        other = detect(value)
        seen = f"is in the format {other}" if other else f"has no key {keys[0]!r}"
        near = _near(value, keys[:1])
        return [f"DATA-026 @ {seen}, expected {kind} as in the rows before it{near}"]
    faults = []
    for key in value:
        if key not in keys and key not in extra and value[key] is not None:
            near = _near({key: 0}, keys) if len(key) >= SHORT and key not in usual else ""
            if near:
                faults.append(f"DATA-002 @ has the unknown key {key!r}{near}")
            else:
                row.ignored.append(key)
    for key in ("id", "group"):
        if key in value and (
            not isinstance(value[key], (str, int)) or isinstance(value[key], bool) or value[key] == ""
        ):
            faults.append(f"DATA-001 @ {key} is {type_name(value[key])}, expected str or int")
    faults += _READERS[kind](row, value)
    if faults:
        return faults
    if "id" in value:
        row.id = str(value["id"])
    faults += _choices(row, value) if "choices" in value else []
    faults += _encodable(row)
    if not faults:
        row.group = str(value["group"]) if "group" in value else ""
    return faults


def grouped(row: Row, value: dict[str, Any], group_by: str, time_by: str) -> list[str]:
    """Sets `group` and `time` of a good row from the columns that settings name; faults where one is missing."""
    faults = []
    for key, what in ((group_by, "group"), (time_by, "time")):
        if not key:
            continue
        if key not in value or not isinstance(value[key], (str, int, float)) or value[key] == "":
            seen = type_name(value[key]) if key in value else "missing"
            faults.append(f"DATA-001 @ {key} is {seen}, expected str or number, because data.{what}_by names it")
        else:
            setattr(row, what, str(value[key]))
    dated = re.match(r"\d{4}(-\d\d(-\d\d([T ].*)?)?)?$|$", row.time) or NUMBER.fullmatch(row.time)
    if not dated or (row.time and moment(row.time, years=True) is None):
        faults.append(f"DATA-001 @ {time_by} is no date, expected YYYY-MM-DD or a number")
        row.time = ""
    return faults


def _messages(row: Row, value: dict[str, Any]) -> list[str]:
    found = value["messages"]
    if not isinstance(found, list) or not found:
        return [f"DATA-001 @ messages is {type_name(found)}, expected list with messages"]
    faults: list[str] = []
    row.tools = tools_of(value, faults)
    names = {tool["function"]["name"] for tool in row.tools}
    row.messages = [message(m, f"messages[{i}]", names, faults) for i, m in enumerate(found)]
    return faults or order(row.messages)


def _sharegpt(row: Row, value: dict[str, Any]) -> list[str]:
    turns = value["conversations"]
    faults: list[str] = []
    if not isinstance(turns, list) or not turns:
        return [f"DATA-001 @ conversations is {type_name(turns)}, expected list with turns"]
    row.tools = tools_of(value, faults)
    row.messages = _system(value, faults)
    for i, turn in enumerate(turns):
        at = f"conversations[{i}]"
        if not isinstance(turn, dict):
            faults.append(f"DATA-001 @ {at} is {type_name(turn)}, expected dict with from and value")
            continue
        source, text = turn.get("from"), turn.get("value")
        if source == "function_call" and isinstance(text, str):
            call, fault = checked(text, f"@ {at}.value")
            known = isinstance(call, dict) and "name" in call and isinstance(call.get("arguments"), dict)
            if not known:
                fault = f"DATA-025 @ {at}.value is no JSON with name and arguments, expected a function call"
            faults += [fault] if fault else []
            made = {"name": str(call["name"]), "arguments": call["arguments"]} if known else {}
            calls = [{"type": "function", "function": made}]
            row.messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        elif not isinstance(source, str) or source not in SHAREGPT:
            seen = repr(source)[:40] if isinstance(source, str) else type_name(source)
            faults.append(f"DATA-001 @ {at}.from is {seen}, expected one of {', '.join(SHAREGPT)}")
        elif not isinstance(text, str):
            faults.append(f"DATA-001 @ {at}.value is {type_name(text)}, expected str")
        elif not text.strip() and SHAREGPT[source] != "tool":
            faults.append(f"DATA-003 @ {at}.value is empty")
        else:
            row.messages.append({"role": SHAREGPT[source], "content": text})
    return faults or order(row.messages)


def _system(value: dict[str, Any], faults: list[str]) -> list[dict[str, Any]]:
    text = value["system"] if "system" in value and value["system"] is not None else ""
    if not isinstance(text, str):
        faults.append(f"DATA-001 @ system is {type_name(text)}, expected str")
        return []
    return [{"role": "system", "content": text}] if text.strip() else []


def _alpaca(row: Row, value: dict[str, Any]) -> list[str]:
    faults: list[str] = []
    parts = {}
    for key in ("instruction", "input", "output"):
        parts[key] = value[key] if key in value and value[key] is not None else ""
        if not isinstance(parts[key], str):
            faults.append(f"DATA-001 @ {key} is {type_name(parts[key])}, expected str")
        elif key != "input" and not parts[key].strip():
            faults.append(f"DATA-003 @ {key} is {'empty' if key in value else 'missing'}")
    row.messages = _system(value, faults)
    history = value["history"] if "history" in value and value["history"] is not None else []
    if not isinstance(history, list) or any(
        not isinstance(p, list) or [type(t) for t in p] != [str, str] for p in history
    ):
        faults.append(f"DATA-001 @ history is {type_name(history)}, expected list of [question, answer]")
    if faults:
        return faults
    for question, answer in history:
        row.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    asked = f"{parts['instruction']}\n\n{parts['input']}" if parts["input"].strip() else parts["instruction"]
    row.messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": parts["output"]}]
    return order(row.messages)


def _prompt_completion(row: Row, value: dict[str, Any]) -> list[str]:
    faults: list[str] = []
    prompt, completion = value["prompt"], value["completion"] if "completion" in value else None
    row.messages = _system(value, faults)
    for key, item, role in (("prompt", prompt, "user"), ("completion", completion, "assistant")):
        if isinstance(item, list) and item:
            row.messages += [message(m, f"{key}[{i}]", set(), faults) for i, m in enumerate(item)]
        elif not isinstance(item, str):
            faults.append(f"DATA-001 @ {key} is {type_name(item)}, expected str or list of messages")
        elif not item.strip():
            faults.append(f"DATA-003 @ {key} is empty")
        else:
            row.messages.append({"role": role, "content": item})
    if not faults and isinstance(prompt, list):  # what the prompt's assistant said before is not what is learnt
        for m in row.messages[: -len(completion) if isinstance(completion, list) else -1]:
            m.update({"weight": 0} if m["role"] == "assistant" else {})
    return faults or order(row.messages)


def _text(row: Row, value: dict[str, Any]) -> list[str]:
    if not isinstance(value["text"], str):
        return [f"DATA-001 @ text is {type_name(value['text'])}, expected str"]
    row.text = value["text"]
    return [] if row.text.strip() else ["DATA-003 @ text is empty"]


def _tokens(row: Row, value: dict[str, Any]) -> list[str]:
    faults = []
    for key in ("input_ids", "labels"):
        ids = value[key] if key in value else None
        if key == "labels" and ids is None:
            continue
        if not isinstance(ids, list) or not ids or any(type(i) is not int for i in ids):
            faults.append(f"DATA-028 @ {key} is {type_name(ids)}, expected list of int")
    if faults:
        return faults
    row.input_ids = value["input_ids"]
    row.labels = value["labels"] if "labels" in value and value["labels"] is not None else list(row.input_ids)
    if len(row.labels) != len(row.input_ids):
        return [f"DATA-028 @ labels has {len(row.labels)} entries, expected {len(row.input_ids)} as input_ids has"]
    if any(label not in (-100, token) for label, token in zip(row.labels, row.input_ids, strict=True)):
        return ["DATA-028 @ labels differ from input_ids, expected the same ids or -100"]
    if any(label != -100 for label in row.labels[1:]):
        return []
    return ["DATA-003 @ labels has no trained token behind the first, which nothing can predict"]


_READERS = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
    "tokens": _tokens,
}


def _choices(row: Row, value: dict[str, Any]) -> list[str]:
    choices = value["choices"]
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        return [f"DATA-001 @ choices is {type_name(choices)}, expected list of str"]
    if not row.messages:
        return ["DATA-010 @ has choices and no conversation"]
    row.choices, row.label = choices, row.messages[-1]["content"] if choices else ""
    return ["DATA-010 @ the answer is not one of its choices"] if choices and row.label not in choices else []


def _encodable(row: Row) -> list[str]:
    """A fault for half of a surrogate pair, which JSON can name and no text can hold."""
    try:
        json.dumps([row.messages, row.tools, row.text, row.choices, row.id], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return ["DATA-021 @ has half of a surrogate pair, which is no character"]
    return []


def _near(value: dict[str, Any], known: tuple[str, ...]) -> str:
    found = next((m for key in value for m in difflib.get_close_matches(str(key), known, 1, 0.75)), "")
    return f", did you mean {found!r}?" if found else ""
