"""Keys of a model's settings that would load code: `code_keys(folder)` finds them in every JSON file, at any depth.

`trust_remote_code=False`, which is what we load with, has been passed over by such keys before, in transformers 4.56
to 5.2: CVE-2026-4372 (`_attn_implementation_internal`), CVE-2026-5241 (a config that sets `trust_remote_code`). So they
are refused, whatever the installed version does with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.foreign.kinds import IGNORE, NEVER, REFUSE, UNREAD, Problem

CODE_KEYS = frozenset(
    {
        *("auto_map", "trust_remote_code", "_attn_implementation_internal", "_experts_implementation_internal"),
        *("custom_pipelines", "custom_generate", "kernel_config"),
    }
)
"""Keys that name code of a repository."""

NAMED_CODE = frozenset(
    {
        *("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation"),
        *("_attn_implementation_autoset", "attention_implementation"),
    }
)
"""Keys whose value names code of a repository where it has the form org/repo."""

VOCABULARIES = {"tokenizer.json", "vocab.json", "added_tokens.json", "tekken.json", "special_tokens.json"}
"""Files whose keys are words, not settings."""

INDEX = ".index.json"
SETTINGS_LIMIT = 32 * 2**20
"""Bytes of a settings file, at most. Published ones have up to some hundred thousand."""

WHY = "it would load code that is not part of this program; trust_remote_code stays off here"
FIX = "a copy of the file without the key: families that are supported need no code of their publisher"


def code_keys(folder: Path, code: str = NEVER) -> Iterator[Problem]:
    """An entry with every key that would load code, and one with every settings file that cannot be searched.

    With `code` ignore such keys are no problem: nobody is handed a file that has one (`finetune.inert`).
    """
    found, unread = [], []
    for path in settings_files(folder):
        try:
            found += [f"{path.name} has {key}" for key in find_code(read_settings(path))]
        except (ValueError, OSError, RecursionError) as error:
            unread.append(f"{path.name} ({str(error).splitlines()[0]})")
    if found and code != IGNORE:
        yield "FRN-003", found, WHY, f"{UNREAD}, or {FIX}" if code == REFUSE else FIX
    if unread:
        yield "FRN-003", unread, "settings that cannot be read cannot be searched for code", "fetch the folder again"


def settings_files(folder: Path) -> list[Path]:
    """JSON files with settings, sorted: neither vocabularies nor indexes of weights."""
    return [p for p in sorted(folder.glob("*.json")) if p.name not in VOCABULARIES and not p.name.endswith(INDEX)]


def read_settings(path: Path) -> Any:
    """The JSON value of a settings file. Raises ValueError when it is none, or larger than any is."""
    if path.stat().st_size > SETTINGS_LIMIT:
        raise ValueError(f"larger than {SETTINGS_LIMIT:,} bytes")
    return json.loads(path.read_text(encoding="utf-8"))


def find_code(value: Any) -> list[str]:
    """Dotted names of all keys in nested settings that would load code, as texts that can be printed and written."""
    found = (name for name, key, inner in _entries(value) if key in CODE_KEYS or (key in NAMED_CODE and _repo(inner)))
    return [name.encode("utf-8", "backslashreplace").decode() for name in found]  # JSON may hold half a character


def without_code(value: Any) -> Any:
    """The same settings without these keys."""
    if isinstance(value, dict):
        return {k: without_code(v) for k, v in value.items() if not (k in CODE_KEYS or (k in NAMED_CODE and _repo(v)))}
    return [without_code(inner) for inner in value] if isinstance(value, list) else value


def _entries(value: Any) -> Iterator[tuple[str, str, Any]]:
    """(dotted name, key, value) of every entry of nested mappings. Without recursion: nesting may be deep."""
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        prefix, value = waiting.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                name = f"{prefix}.{key}" if prefix else str(key)
                yield name, str(key), inner
                waiting.append((name, inner))
        elif isinstance(value, list):
            waiting += [(prefix, inner) for inner in value]


def _repo(value: Any) -> bool:
    """Whether a value, or one in it, is of the form org/repo."""
    if isinstance(value, dict):
        return any(map(_repo, value.values()))
    return isinstance(value, str) and "/" in value
