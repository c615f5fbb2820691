"""Prompts of the user's own that should be refused, or answered: CSV or JSONL files of published sets by their columns.

HarmBench (Mazeika et al. 2024), XSTest (Röttger et al. 2024) and StrongREJECT (Souly et al. 2024) are recognised; none
of them is shipped.
"""

from __future__ import annotations

from typing import Any, Literal

from finetune.data.files import blocks, sources
from finetune.data.records import records
from finetune.errors import DataError
from finetune.recipe import Recipe

Kind = Literal["harmful", "benign"]

COLUMNS = ("Behavior", "forbidden_prompt", "prompt")
"""Column of the prompt: HarmBench's, StrongREJECT's, XSTest's and anybody's own."""


def own_prompts(recipe: Recipe) -> dict[Kind, list[str]]:
    """Kind -> the prompts of the recipe's file of that kind, in its order, each once; no file, no kind.

    Raises DataError DATA-043 for a file that has no such column or none of that kind.
    """
    files: dict[Kind, str] = {"harmful": recipe.evaluate.harmful_file, "benign": recipe.evaluate.benign_file}
    return {kind: read_prompts(file, kind) for kind, file in files.items() if file}


def read_prompts(file: str, kind: Kind) -> list[str]:
    """The prompts of one kind in a file. XSTest has both: its contrasts should be refused, all others answered."""
    found: list[str] = []
    columns: set[str] = set()
    for source in sources([file]):
        for block in blocks(source):
            for record in records(block):
                if not isinstance(record.value, dict):
                    fault = record.faults[0].partition(" @ ")[2] if record.faults else "it is no object"
                    raise _unread(f"{source.name}:{record.line}", fault)
                columns |= set(record.value)
                prompt = _prompt(record.value)
                if prompt and _kind(record.value, kind) == kind:
                    found.append(prompt)
    if not found:
        why = f"its columns are {', '.join(sorted(columns)[:9]) or 'none'}, and none of {', '.join(COLUMNS)} has one"
        raise _unread(file, why)
    return list(dict.fromkeys(found))


def _prompt(value: dict[str, Any]) -> str:
    column = next((name for name in COLUMNS if isinstance(value[name] if name in value else None, str)), "")
    if not column:
        return ""
    context = value["ContextString"] if column == "Behavior" and "ContextString" in value else None
    return "\n\n".join(text.strip() for text in (context, value[column]) if isinstance(text, str) and text.strip())


def _kind(value: dict[str, Any], asked: Kind) -> Kind:
    """What the row says of itself; a file that does not say is of the kind that it was named as."""
    if "type" in value and "prompt" in value and ("focus" in value or "label" in value):
        if "label" in value and value["label"] in ("safe", "unsafe"):
            return "harmful" if value["label"] == "unsafe" else "benign"
        return "harmful" if str(value["type"]).startswith("contrast") else "benign"
    return asked


def _unread(where: str, why: str) -> DataError:
    what = f"{where} has no prompts that can be asked"
    return DataError("DATA-043", what, why, "a CSV or JSONL file with a column prompt")
