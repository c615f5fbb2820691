"""What an export must carry besides weights: README.md, LICENSE, NOTICE, bom.cdx.json. `write_papers(...)`.

With export.croissant=true also croissant.json.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from finetune import __version__, permits, record, terms
from finetune.errors import RecipeError
from finetune.export.bom import bom
from finetune.export.card import card, export_name, method_name
from finetune.export.croissant import croissant
from finetune.licences import Licence, find_licence, standard_text
from finetune.recipe import Recipe
from finetune.rundir import RunDir, write_json, write_text


def require_permits(run_dir: RunDir, recipe: Recipe, base: Path) -> None:
    """Nothing, or RecipeError with every licence rule that forbids this export (LIC-00x)."""
    if broken := permits.broken_rules(recipe, base, permits.accepted_in(run_dir)):
        raise RecipeError([verdict.sentence() for verdict in broken])


def lacking(recipe: Recipe, base: Path) -> list[str]:
    """A sentence where the export will be without the text of the base's licence (LIC-009)."""
    return [v.sentence() for v in permits.verdicts(recipe, base) if v.rule == "LIC-009" and v.passed is None]


def write_papers(run_dir: RunDir, recipe: Recipe, base: Path, folder: Path) -> None:
    """Writes the papers into an export that is otherwise complete; LICENSE and NOTICE into each part of it too."""
    facts = record.derived(run_dir, recipe, base)
    name = export_name(run_dir, recipe)
    carried = copy_texts(recipe, base, folder)
    write_text(folder / "NOTICE", notice(name, recipe, facts, base, carried))
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):  # each may be passed on alone
        for paper in [*carried, "NOTICE"]:
            (part / paper).unlink(missing_ok=True)  # may share its bytes with merged/
            shutil.copyfile(folder / paper, part / paper)
    inputs = record.hashed_inputs(run_dir, recipe, base)
    if recipe.export.croissant:
        write_json(folder / "croissant.json", croissant(name, run_dir, recipe, facts, inputs))
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    write_json(folder / "bom.cdx.json", bom(name, recipe, facts, (base, inputs), record.hashes(folder, files)))
    write_text(folder / "README.md", card(name, recipe, facts))


def copy_texts(recipe: Recipe, base: Path, folder: Path) -> list[str]:
    """Copies the licence texts beside the weights, else writes the standard one if there is one; the names of them."""
    found = [path for path in permits.licence_files(base) if not path.name.startswith("NOTICE")]
    for path in found:
        shutil.copyfile(path, folder / path.name)
    if any(path.match(pattern) for path in found for pattern in terms.TEXTS):
        return [path.name for path in found]
    text = standard_text(terms.key_of(recipe))
    if text:
        write_text(folder / "LICENSE", text)
    return [*(path.name for path in found), *(["LICENSE"] if text else [])]


def notice(name: str, recipe: Recipe, facts: dict[str, Any], base: Path, carried: list[str]) -> str:
    """The NOTICE file: what the licence prescribes, that files were changed, the rows, and the base's own notices."""
    licence, told, rows = find_licence(terms.key_of(recipe)), facts["licences"], facts["licences"]["rows"]
    title = recipe.model.title or recipe.model.name
    lines = [name, "", *_changes(recipe, title), ""]
    if told["applies"]:
        lines += _of_licence(licence, told, carried)
    else:
        lines += [
            "This is a rehearsal: the weights are random and were made here, so no licence of a base applies to them.",
            f"At full scale it would be under: {told['title'] or told['base'] or 'a licence that is not known'}.",
        ]
    lines += ["", "The rows it was trained on:"]
    lines.append(
        f"- {rows['title'] if 'title' in rows else 'rows of the user'}: {rows['licence']}" if rows else "- not known"
    )
    if rows and rows["attribution"]:
        lines.append(f"- {rows['attribution']}")
    if recipe.licence.of_rows:
        lines.append(f"- licence, as their owner says: {recipe.licence.of_rows}")
    for path in permits.licence_files(base):
        if path.name.startswith("NOTICE"):
            lines += ["", f"{path.name} of the base:", "", path.read_text(encoding="utf-8", errors="replace").strip()]
    return "\n".join([*lines, "", "Information, not legal advice."]) + "\n"


def _changes(recipe: Recipe, title: str) -> list[str]:
    when = time.strftime("%Y-%m-%d", time.gmtime())
    how = f"fine-tuned with {method_name(recipe)} by finetune {__version__}, exported on {when}"
    return [
        f"The weights in this folder are changed: {title}, {how}.",
        "README.md and bom.cdx.json say how and on what.",
    ]


def _of_licence(licence: Licence | None, told: dict[str, Any], carried: list[str]) -> list[str]:
    lines = [line for line in ((licence.notice, licence.display) if licence else ()) if line]
    named = f"{told['title'] or told['base'] or 'a licence that is not known'} {told['url']}".rstrip()
    texts = [name for name in carried if any(Path(name).match(pattern) for pattern in terms.TEXTS)]
    lines.append(f"Licence of the base: {named}")
    if texts:
        lines.append(f"Its text: {', '.join(texts)}.")
    else:
        lines.append(f"Its text was not beside the weights. Add it as LICENSE before you pass this on: {told['url']}")
    if licence and licence.use_policy:
        lines.append(f"Acceptable use: {licence.use_policy}")
    if licence and licence.covers_outputs:
        lines.append("Its duties reach models that are trained on what this one writes.")
    lines += ["", "What it asks of whoever uses or passes this on:", *(f"- {duty}" for duty in told["duties"])]
    return lines if told["duties"] else [*lines, "- its duties are not known here: read it"]
