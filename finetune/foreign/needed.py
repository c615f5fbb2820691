"""Whether a model can do without its publisher's code: `needed_code(folder)` names what only that code has."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune.foreign.configs import read_settings
from finetune.foreign.kinds import Problem

TOKENIZER = "tokenizer.json"
"""The whole of a tokenizer as data: with it no class of its own is needed."""


def needed_code(folder: Path) -> Iterator[Problem]:
    """An entry where the settings name a class that transformers has not: `architectures`, or the tokenizer's class."""
    named = [("config.json", "architectures", _list(_setting(folder / "config.json", "architectures")))]
    if not (folder / TOKENIZER).is_file():
        settings = folder / "tokenizer_config.json"
        named.append((settings.name, "tokenizer_class", _list(_setting(settings, "tokenizer_class"))))
    lacking = [f"{file} has {key}={name}" for file, key, names in named for name in names if not _is_known(name)]
    if lacking:
        why = f"transformers {version('transformers')} has no such class, and code of a publisher is never run here"
        yield "FRN-008", lacking, why, "a base whose architecture transformers has; model.code=ignore cannot help"


def _is_known(name: str) -> bool:
    """Whether transformers has a class of this name. Its names are listed without loading torch."""
    import transformers

    return name in dir(transformers)


def _setting(path: Path, key: str) -> Any:
    try:
        values = read_settings(path)
    except (ValueError, OSError, RecursionError):
        return None  # said by `code_keys`, or there is no such file
    return values[key] if isinstance(values, dict) and key in values else None


def _list(value: Any) -> list[str]:
    return [str(name) for name in (value if isinstance(value, list) else [value] if value else [])]
