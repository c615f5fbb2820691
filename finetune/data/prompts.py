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
    rows: list[dict[str, Any]] = []
    for source in sources([file]):
        for block in blocks(source):
            for record in records(block):
                if not isinstance(record.value, dict):
                    fault = record.faults[0].partition(" @ ")[2] if record.faults else "it is no object"
                    raise _unread(f"{source.name}:{record.place}", fault)
                rows.append(record.value)
    said = any(_said(row) for row in rows)  # a file that says nothing is of the kind that it was named as
    found = [_prompt(row) for row in rows if not said or (_said(row) or "benign") == kind]
    if not any(found):
        columns = sorted({name for row in rows for name in row})
        why = f"its columns are {', '.join(columns[:9]) or 'none'}, and it has no {kind} row with one of "
        raise _unread(file, why + ", ".join(COLUMNS))
    return [prompt for prompt in dict.fromkeys(found) if prompt]


def _prompt(value: dict[str, Any]) -> str:
    column = next((name for name in COLUMNS if isinstance(value[name] if name in value else None, str)), "")
    if not column:
        return ""
    context = value["ContextString"] if column == "Behavior" and "ContextString" in value else None
    return "\n\n".join(text.strip() for text in (context, value[column]) if isinstance(text, str) and text.strip())


def _said(value: dict[str, Any]) -> Kind | None:
    """What a row of XSTest says of itself: by its label, or as a contrast; None where it says nothing."""
    if "label" in value and value["label"] in ("safe", "unsafe"):
        return "harmful" if value["label"] == "unsafe" else "benign"
    return "harmful" if "type" in value and str(value["type"]).startswith("contrast_") else None


def _unread(where: str, why: str) -> DataError:
    what = f"{where} has no prompts that can be asked"
    return DataError("DATA-043", what, why, "a CSV or JSONL file with a column prompt")
