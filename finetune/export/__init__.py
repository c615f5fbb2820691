"""What a server loads: `export(run_dir)` leaves export/ with a model folder, the adapter, and the merge's proof."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from finetune.compose import read_recipe
from finetune.export.card import card
from finetune.parity import Parity
from finetune.rundir import RunDir, atomic_folder, write_json, write_text


def export(run_dir: RunDir) -> None:
    """Writes export/ of a run: the formats the recipe names, parity.json and README.md.

    The merge has proved that its weights are what was trained; without it there is nothing to export.
    """
    recipe = read_recipe(run_dir.recipe)
    adapter = run_dir.require(run_dir.adapter, "train")
    with atomic_folder(run_dir.export) as folder:
        parity = None
        if "hf" in recipe.export.formats:
            parity = Parity.read(run_dir.require(run_dir.parity, "merge"))
            link_tree(run_dir.merged, folder / "hf")
            for name in (run_dir.parity.name, run_dir.answers.name):  # held-out rows are not given away
                (folder / "hf" / name).unlink(missing_ok=True)
            write_json(folder / "parity.json", parity.as_dict())
        if "peft" in recipe.export.formats:
            link_tree(adapter, folder / "peft")
        write_text(folder / "README.md", card(run_dir, recipe, parity))


def link_tree(source: Path, target: Path) -> None:
    """A copy of a folder that shares the files' bytes on disk where the file system allows it."""

    def link(from_: str, to: str) -> None:
        try:
            os.link(from_, to)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(from_, to)

    shutil.copytree(source, target, copy_function=link)
