"""What may stand beside run=: changes that the run is allowed, their settings, and a licence text that is accepted.

`refuse(words, run)` looks at the words alone, `allow(run_dir, words)` keeps them in the run folder.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any

from finetune import events, keys, slurm
from finetune.check import CHANGEABLE
from finetune.compose import read_recipe, recipe_yaml, with_settings
from finetune.errors import RecipeError, RunError
from finetune.machine import settled
from finetune.plan import plan
from finetune.recipe import Recipe
from finetune.run import STAGES
from finetune.run import refuse as refuse_recipe
from finetune.rundir import RunDir, read_json, write_json, write_text

ALLOW = "train.allow_changed="
ACCEPT = "licence.accept="
COVERED = {
    "launch.devices": "world_size",
    "launch.nodes": "world_size",
    "launch.distribution": "distribution",
    "launch.context_parallel": "distribution",
    "train.precision": "precision",
    "seed": "seed",
}
"""Setting -> the change that covers it; every other one of `train` is covered by `settings`."""


def refuse(words: Sequence[str], verb: str, run: str) -> None:
    """Nothing, or RecipeError for words that may not stand beside run=."""
    given = _settings(words)
    plain = " ".join(given)
    needed = {word: _covered_by(_key(word)) for word in given}
    if given and (not all(needed.values()) or verb not in ("run", *STAGES)):
        kept = " ".join(word for word in given if not needed[word]) or plain
        raise RecipeError([f"CFG-010 {kept}: a run keeps its settings. Leave out run= to start a new run with them."])
    names = _names(words)
    if missing := [name for name in dict.fromkeys(needed.values()) if name not in names]:
        verb = "" if verb == "run" else f" {verb}"
        allowed = ",".join([*names, *missing])
        raise RecipeError(
            [
                f"CFG-010 {plain}: a run keeps its settings, unless it is allowed to go on with others. Type: "
                f"python -m finetune{verb} run={run} {plain} {ALLOW}[{allowed}], or leave out run= for a new run."
            ]
        )
    if wrong := sorted(set(names) - set(CHANGEABLE)):
        raise RecipeError(
            [f"LCH-003 {ALLOW[:-1]}: {', '.join(wrong)} is none of {', '.join(CHANGEABLE)}. Choose of them."]
        )
    if wrong := [text for text in _texts(words) if not re.fullmatch(r"[0-9a-f]{64}", text)]:
        raise RecipeError([f"LIC-008 {ACCEPT}{wrong[0]} must be the 64 hex digits of the text. Type: sha256sum FILE"])


def allow(run_dir: RunDir, words: Sequence[str]) -> None:
    """Keeps in the run folder what may differ from its checkpoint, new settings, and which licence text is accepted.

    The frozen recipe and the plan are written anew where settings change; the record says which did. Raises RecipeError
    when the run cannot go on with them, RunError when it is trained, in use or queued.
    """
    given = _settings(words)
    frozen = read_recipe(run_dir.recipe)
    recipe = settled(with_settings(frozen, given)) if given else frozen
    changed = _changed(frozen, recipe)
    if not changed:
        _note(run_dir, words, {})
        return
    if all(path.exists() for path in STAGES["train"](run_dir)):
        what = f"{run_dir.path} is trained: {', '.join(changed)} cannot change any more"
        raise RunError("RUN-006", what, "the record would name settings that nothing was trained with", "a new run")
    refuse_recipe(recipe)
    if recipe.launch.kind == "slurm":
        slurm.refuse_queued(run_dir)
    with run_dir.lock():
        _note(run_dir, words, changed)
        write_json(run_dir.plan, plan(recipe).as_json())
        write_text(run_dir.recipe, recipe_yaml(recipe))


def _note(run_dir: RunDir, words: Sequence[str], changed: dict[str, list[Any]]) -> None:
    """Adds what is allowed to allowed.json and to the events."""
    earlier = read_json(run_dir.allowed) if run_dir.allowed.exists() else []
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    names = _names(words)
    now: list[dict[str, Any]] = [{"when": when, "names": names} | ({"settings": changed} if changed else {})]
    now = now if names else []
    now += [{"when": when, "names": [], "licence": text} for text in _texts(words)]
    write_json(run_dir.allowed, [*earlier, *now])
    run_dir.reopen()
    for entry in now:
        more = {"settings": changed} if "settings" in entry else {}
        licence = entry["licence"] if "licence" in entry else ""
        events.note(run_dir, "allowed", changes=entry["names"], licence=licence, **more)


def _changed(then: Recipe, now: Recipe) -> dict[str, list[Any]]:
    """Setting -> [value before, value now], of those that differ."""
    known = keys.settings(Recipe)
    before, after = (dict(keys.flatten(dataclasses.asdict(recipe), known)) for recipe in (then, now))
    return {key: [before[key], after[key]] for key in known if before[key] != after[key]}


def _covered_by(key: str) -> str:
    """The change that covers a setting, or an empty text."""
    if key in COVERED:
        return COVERED[key]
    return "settings" if key.startswith("train.") and key in keys.settings(Recipe) else ""


def _settings(words: Sequence[str]) -> list[str]:
    return [word for word in words if not word.startswith((ALLOW, ACCEPT))]


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def _names(words: Sequence[str]) -> list[str]:
    lists = [word.removeprefix(ALLOW) for word in words if word.startswith(ALLOW)]
    return [name.strip() for text in lists for name in text.strip("[]").split(",") if name.strip()]


def _texts(words: Sequence[str]) -> list[str]:
    return [word.removeprefix(ACCEPT) for word in words if word.startswith(ACCEPT)]
