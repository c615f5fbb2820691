"""One conversation's messages: roles, contents, tools, tool calls, their order, and every fault they can have."""

from __future__ import annotations

from typing import Any

from finetune.data.nested import checked, without_nulls

ROLES = ("system", "user", "assistant", "tool")
"""Roles that chat templates know. OpenAI's `developer` is read as `system`, which it has replaced there."""
MESSAGE = (
    "role",
    "content",
    "weight",
    "name",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "thinking",
    "reasoning",
)
REASONING = ("reasoning_content", "thinking", "reasoning")


def message(m: Any, at: str, tools: set[str], faults: list[str]) -> dict[str, Any]:
    """One message as templates want it; its faults are added to `faults`."""
    if not isinstance(m, dict):
        faults.append(f"DATA-001 @ {at} is {type_name(m)}, expected dict with role and content")
        return {}
    m = {key: item for key, item in m.items() if item is not None}
    for key in m:
        if key not in MESSAGE:
            faults.append(f"DATA-002 @ {at} has the unknown key {key!r}")
    role = m["role"] if "role" in m else None
    role = "system" if role == "developer" else role
    if role not in ROLES:
        seen = repr(role)[:40] if isinstance(role, str) else type_name(role)
        faults.append(f"DATA-001 @ {at}.role is {seen}, expected one of {', '.join(ROLES)}")
        return {}
    made: dict[str, Any] = {"role": role, "content": m["content"] if "content" in m else ""}
    calls = m["tool_calls"] if "tool_calls" in m else []
    if not isinstance(made["content"], str) or ("content" not in m and not calls):
        seen = type_name(m["content"]) if "content" in m else "missing"
        faults.append(f"DATA-001 @ {at}.content is {seen}, expected str")
    elif not made["content"].strip() and not calls and role != "tool":
        faults.append(f"DATA-003 @ {at}.content is empty")
    if "weight" in m:
        if m["weight"] not in (0, 1) or isinstance(m["weight"], bool):
            faults.append(f"DATA-001 @ {at}.weight is {type_name(m['weight'])}, expected 0 or 1")
        elif role != "assistant":
            faults.append(f"DATA-001 @ {at}.weight stands at {role}, expected at assistant messages only")
        made["weight"] = m["weight"]
    thought = [key for key in REASONING if key in m]
    if thought and (role != "assistant" or not isinstance(m[thought[0]], str)):
        seen = type_name(m[thought[0]])
        faults.append(f"DATA-001 @ {at}.{thought[0]} is {seen} at {role}, expected str at assistant")
    elif thought:
        made["reasoning"] = m[thought[0]]
    for key in ("name", "tool_call_id"):
        if key in m:
            if not isinstance(m[key], str):
                faults.append(f"DATA-001 @ {at}.{key} is {type_name(m[key])}, expected str")
            made[key] = m[key]
    if "tool_calls" in m:
        made["tool_calls"] = _calls(calls, at, role, tools, faults)
    return made


def _calls(calls: Any, at: str, role: str, tools: set[str], faults: list[str]) -> list[dict[str, Any]]:
    """OpenAI's tool calls with their arguments as objects, which chat templates want."""
    if role != "assistant" or not isinstance(calls, list):
        faults.append(f"DATA-025 @ {at}.tool_calls is {type_name(calls)} at {role}, expected list at assistant")
        return []
    made = []
    for i, call in enumerate(calls):
        here = f"{at}.tool_calls[{i}]"
        function = call["function"] if isinstance(call, dict) and "function" in call else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            faults.append(f"DATA-025 @ {here}.function.name is missing, expected str")
            continue
        arguments = function["arguments"] if "arguments" in function else {}
        if isinstance(arguments, str):
            arguments, fault = checked(arguments, f"@ {here}.function.arguments")
            if fault and arguments is None:
                fault = f"DATA-025 @ {here}.function.arguments is no JSON, expected an object as JSON"
            if fault:
                faults.append(fault)
                continue
        if not isinstance(arguments, dict):
            faults.append(f"DATA-025 @ {here}.function.arguments is {type_name(arguments)}, expected dict")
            continue
        if tools and function["name"] not in tools:
            faults.append(f"DATA-025 @ {here}.function.name is none of the row's tools")
        entry = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        made.append(entry | ({"id": call["id"]} if isinstance(call, dict) and isinstance(call.get("id"), str) else {}))
    return made


def tools_of(value: dict[str, Any], faults: list[str]) -> list[dict[str, Any]]:
    """The functions that a row offers to the assistant; faults are added to `faults`."""
    tools = value["tools"] if "tools" in value and value["tools"] is not None else []
    if isinstance(tools, str):
        tools, fault = checked(tools, "@ tools")
        if fault and tools is not None:
            faults.append(fault)
            return []
    if not isinstance(tools, list):
        faults.append(f"DATA-025 @ tools is {type_name(value['tools'])}, expected list of functions")
        return []
    made = []
    for i, tool in enumerate(tools):
        function = tool["function"] if isinstance(tool, dict) and "function" in tool else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            faults.append(f"DATA-025 @ tools[{i}].function.name is missing, expected str")
        else:
            made.append({"type": "function", "function": without_nulls(function)})
    return made


def order(messages: list[dict[str, Any]]) -> list[str]:
    """The first fault in the order of roles: system? (user assistant (tool+ assistant)*)+, an assistant at the end."""
    roles = [m["role"] for m in messages]
    turns = list(enumerate(messages))[1 if roles[0] == "system" else 0 :]
    if not turns or turns[-1][1]["role"] != "assistant":
        return ["DATA-003 @ has no assistant message at its end, so there is nothing to learn from it"]
    expected: tuple[str, ...] = ("user",)
    open_calls: list[str] = []
    for i, m in turns:
        if m["role"] not in expected:
            behind = f"behind {roles[i - 1]}" if i else "at the beginning"
            return [f"DATA-004 @ messages[{i}].role is {m['role']} {behind}, expected {' or '.join(expected)}"]
        if m["role"] == "user":
            expected = ("assistant",)
        elif m["role"] == "assistant":
            calls = m["tool_calls"] if "tool_calls" in m else []
            open_calls = [call["id"] if "id" in call else "" for call in calls]
            expected = ("tool",) if calls else ("user",)
        else:
            given = m["tool_call_id"] if "tool_call_id" in m else ""
            if given not in open_calls and (given or "" not in open_calls):
                return [f"DATA-025 @ messages[{i}].tool_call_id is no id of the calls before it"]
            open_calls.remove(given if given in open_calls else "")
            expected = ("tool",) if open_calls else ("assistant",)
    if not any("weight" not in m or m["weight"] for m in messages if m["role"] == "assistant"):
        return ["DATA-003 @ gives every assistant message the weight 0, so there is nothing to learn from it"]
    return []


def type_name(value: Any) -> str:
    """The type of a value as faults name it."""
    if value is None:
        return "missing"
    return f"an empty {type(value).__name__}" if value in ("", [], {}) else type(value).__name__
