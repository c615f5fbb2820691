"""What a server loads: `export(run_dir)` leaves export/ with a model folder, the adapter, and the merge's proof."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from finetune.compose import read_recipe
from finetune.export.papers import require_permits, write_papers
from finetune.parity import Parity
from finetune.rundir import RunDir, atomic_folder, write_json


def export(run_dir: RunDir) -> None:
    """Writes export/ of a run: the formats the recipe names, parity.json, README.md, LICENSE, NOTICE and bom.cdx.json.

    The merge has proved that its weights are what was trained; without it there is nothing to export. Raises
    RecipeError (LIC-00x) where a licence forbids it.
    """
    from finetune.source import base_folder

    recipe = read_recipe(run_dir.recipe)
    adapter = run_dir.require(run_dir.adapter, "train")
    base = base_folder(recipe)
    require_permits(run_dir, recipe, base)
    with atomic_folder(run_dir.export) as folder:
        if "hf" in recipe.export.formats:
            parity = Parity.read(run_dir.require(run_dir.parity, "merge"))
            link_tree(run_dir.merged, folder / "hf")
            for name in (run_dir.parity.name, run_dir.answers.name):  # held-out rows are not given away
                (folder / "hf" / name).unlink(missing_ok=True)
            write_json(folder / "parity.json", parity.as_dict())
        if "peft" in recipe.export.formats:
            link_tree(adapter, folder / "peft")
        write_papers(run_dir, recipe, base, folder)


def link_tree(source: Path, target: Path) -> None:
    """A copy of a folder that shares the files' bytes on disk where the file system allows it."""

    def link(from_: str, to: str) -> None:
        try:
            os.link(from_, to)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(from_, to)

    shutil.copytree(source, target, copy_function=link)
