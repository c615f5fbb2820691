"""What a server loads: `export(run_dir)` leaves export/ with a model folder, the adapter, and a proof of both."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from finetune.compose import read_recipe
from finetune.errors import GateError
from finetune.export.card import card
from finetune.export.parity import Parity, prove
from finetune.recipe import Recipe
from finetune.rundir import RunDir, atomic_folder, write_json, write_text


def export(run_dir: RunDir) -> None:
    """Writes export/ of a run: the formats the recipe names, parity.json and README.md.

    Raises GateError (MRG-010 to MRG-012, exit code 4) when what stock transformers loads is not what was trained; the
    adapter and the merged weights stay where they are.
    """
    from rich.console import Console

    from finetune.data import load_splits
    from finetune.source import base_folder

    recipe = read_recipe(run_dir.recipe)
    adapter = run_dir.require(run_dir.trained, "train")
    console = Console()
    with atomic_folder(run_dir.export) as folder:
        parity = None
        if "hf" in recipe.export.formats:
            link_tree(run_dir.require(run_dir.merged, "merge"), folder / "hf")
            console.print("comparing the export, loaded by stock transformers, with the adapter on its base ...")
            parity = prove(base_folder(recipe), adapter, folder / "hf", load_splits(run_dir).heldout, recipe)
            console.print(parity.sentence())
            write_json(folder / "parity.json", parity.as_dict())
            refuse_drift(parity, recipe)
        if "peft" in recipe.export.formats:
            link_tree(adapter, folder / "peft")
        write_text(folder / "README.md", card(run_dir, recipe, parity))


def refuse_drift(parity: Parity, recipe: Recipe) -> None:
    """Raises GateError when the export differs from the adapter on its base, or does not differ from the base."""
    limit = recipe.export.max_kl
    if parity.mean_kl > limit:
        what = f"export and adapter differ by {parity.mean_kl:.4f} nats per token, the limit is {limit}"
        raise GateError(
            "MRG-010", what, "the merged weights are not what was trained", "report this; the adapter is unharmed"
        )
    if parity.effect_kl <= parity.mean_kl:
        what = (
            f"the export is as close to the base ({parity.effect_kl:.2g} nats) as to the adapter ({parity.mean_kl:.2g})"
        )
        raise GateError(
            "MRG-011",
            what,
            "training changed too little to be seen in the stored weights",
            "more steps or a larger train.lr",
        )


def link_tree(source: Path, target: Path) -> None:
    """A copy of a folder that shares the files' bytes on disk where the file system allows it."""

    def link(from_: str, to: str) -> None:
        try:
            os.link(from_, to)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(from_, to)

    shutil.copytree(source, target, copy_function=link)
