"""The rows of a run as training and evaluation read them, each with its number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune.data import PackedBatch, load_splits
from finetune.recipe import Recipe
from finetune.rundir import RunDir
from finetune.train.batch import NUMBER, Numbered


def numbered(rows: Any, packed: bool) -> Any:
    """The columns that training reads, with the number of each row."""
    columns = ["input_ids", "labels", *(["position_ids"] if packed else [])]
    return rows.select_columns(columns).add_column(NUMBER, list(range(len(rows))))


def heldout(recipe: Recipe, run_dir: RunDir) -> Any:
    """The held-out rows whose loss is measured during training, never packed; None without such measuring."""
    if not recipe.train.evaluate_steps:
        return None
    rows = load_splits(run_dir).heldout
    count = min(recipe.evaluate.rows or len(rows), len(rows))
    return numbered(rows.select(range(count)), packed=False)


def collator(tokenizer: Any) -> Numbered:
    """Makes batches of rows, or of packed sequences, which bring their positions."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    pad = tokenizer.pad_token_id
    alone, packed = DataCollatorForLanguageModeling(pad_token_id=pad), PackedBatch(pad)
    return Numbered(lambda rows: packed(rows) if "position_ids" in rows[0] else alone(rows))


def names(rows: Any, packed: bool) -> Callable[[list[int]], list[str]]:
    """Row numbers -> what a person can look up."""
    return lambda numbers: [f"sequence {n} of packed.arrow" if packed else str(rows[n]["row"]) for n in numbers]
