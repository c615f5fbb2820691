"""The names and types of all settings, and what to say about a name or a value that is none of them."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

TYPE_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list[str]: "a list of texts such as [a,b]",
    list[float]: "a list of numbers such as [0.3,1.0]",
    dict[str, Any]: "a mapping",
    dict[str, str]: "a mapping of texts such as {a: b}",
    dict[str, int]: "a mapping to whole numbers such as {a: 8}",
    dict[str, float]: "a mapping to numbers such as {a: 0.5}",
}
"""Type of a setting -> how a person calls it."""


def settings(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> type of every setting, in order."""
    known = {}
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        key, kind = prefix + f.name, hints[f.name]
        inner = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        known.update(settings(kind, key + ".") if inner else {key: kind})
    return known


def flatten(tree: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) down to the settings; what lies below an unknown key comes with its full path."""
    flat = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key not in known and isinstance(value, Mapping) and value:
            flat += flatten(value, known, key + ".")
        else:
            flat.append((key, value))
    return flat


def unknown(key: str, known: Mapping[str, Any]) -> str:
    """The sentence about a key that is no setting, with the nearest one."""
    section, _, leaf = key.rpartition(".")
    if any(k.startswith(key + ".") for k in known):
        return f"CFG-004 {key} is a group of settings, not one. Write {key}.NAME=VALUE, or {key}=OPTION for a file."
    if section == "recipe" or section.startswith("recipe."):
        return f"CFG-001 {key}: the recipe file lacks its first line. It must begin with `# @package _global_`."
    beside = [k for k in known if k.rpartition(".")[0] == section]
    by_leaf = {k.rpartition(".")[2]: k for k in reversed(list(known))}
    near = (
        difflib.get_close_matches(key, beside, n=1, cutoff=0.6)
        or [by_leaf[n] for n in difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.7)]
        or difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    )
    hint = "See finetune/recipe.py."
    if near:
        hint = f"Nearest: {near[0]}."
    elif beside:
        hint = f"Settings there: {', '.join(beside)}."
    return f"CFG-001 {key}: there is no such setting. {hint}"


def wrong_type(key: str, value: Any, kind: Any) -> str:
    """The sentence about a value that is not of the setting's type."""
    got = "nothing" if value is None else f"{value!r}"
    return f"CFG-004 {key}={'null' if value is None else value}: expected {TYPE_WORDS[kind]}, got {got}."
