"""config.json as servers want it: what transformers 5 no longer writes, added back. Nothing that is stated changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune.families import Family
from finetune.rundir import read_json, write_json

Fields = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""The text part of a config.json -> fields and values for it."""


def write_served(folder: Path, family: Family) -> list[str]:
    """Writes config.json in `folder` anew with what servers look for; returns the fields that were added.

    The file may be a hard link to another one, which keeps its content.
    """
    path = folder / "config.json"
    before = read_json(path)
    after = text_fields(before, family, family.served_config)
    if after == before:
        return []
    write_json(path, after)
    old, new = family.text_part(before), family.text_part(after)
    return sorted(key for key in new if key not in old or old[key] != new[key])


def text_fields(config: Mapping[str, Any], family: Family, fields: Fields) -> dict[str, Any]:
    """A copy of a config with `fields` added to its text part, and `rope_theta` where it stands only among others.

    A field that `fields` gives is set; one that is there already with the same meaning is for the family to leave out.
    """
    copy: dict[str, Any] = json.loads(json.dumps(config))
    part: Any = family.text_part(copy)
    rope = part.get("rope_parameters") or {}
    if "rope_theta" in rope and "rope_theta" not in part:
        part["rope_theta"] = rope["rope_theta"]
    part.update(fields(part))
    return copy
