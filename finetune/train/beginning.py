"""What an adapter begins with, where that comes from the rows: `beginning(...)`, made once per run."""

from __future__ import annotations

from typing import Any

from safetensors.torch import load_file, save_file

from finetune.adapters import Directions, directions
from finetune.base import Base
from finetune.ranks import Ranks
from finetune.recipe import Recipe
from finetune.rundir import RunDir, atomic_file
from finetune.train.batch import DIGEST, NUMBER
from finetune.train.order import Order
from finetune.train.rows import collator, numbered

MOST_ROWS = 512
"""Training rows that directions are taken from, at most."""


def beginning(recipe: Recipe, run_dir: RunDir, base: Base, rows: Any, packed: bool, ranks: Ranks) -> Directions:
    """The directions that EVA begins with; nothing with other beginnings.

    The first process computes them and leaves them in the run folder; the others, and a training that goes on, read
    them there: ranks follow from them, and a checkpoint has their shapes.
    """
    if recipe.adapter.init != "eva":
        return {}
    error = None
    if ranks.first and not run_dir.directions.exists():
        try:
            found = directions(base, recipe.adapter, batches(recipe, base, rows, packed))
            with atomic_file(run_dir.directions) as partial:
                save_file(found, partial)
        except BaseException as raised:
            error = raised
    ranks.agree(error)
    read: Directions = load_file(run_dir.directions)
    return read


def batches(recipe: Recipe, base: Base, rows: Any, packed: bool) -> list[dict[str, Any]]:
    """The batches of the first epoch's first rows, as one process would read them."""
    data, collate, size = numbered(rows, packed), collator(base.tokenizer), recipe.train.batch_size
    order = list(Order(len(rows), recipe.seed))[:MOST_ROWS]
    made = [collate([data[n] for n in order[begin : begin + size]]) for begin in range(0, len(order), size)]
    device = base.model.device
    return [{name: value.to(device) for name, value in batch.items() if name not in (NUMBER, DIGEST)} for batch in made]
