"""What must not change between a checkpoint and the run that resumes it: `identity(...)`, `changes(...)`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from finetune.check import CHANGEABLE
from finetune.errors import RunError
from finetune.recipe import Recipe
from finetune.record import versions
from finetune.rundir import RunDir, read_json
from finetune.source import base_digest

FREE = {"allow_changed", "save_steps", "keep_checkpoints", "report_to", "rehearse_memory"}
"""Training settings that change no number."""


def identity(recipe: Recipe, run_dir: RunDir, base: Path, world: int, sharing: int = 1) -> dict[str, Any]:
    """Name -> value, of everything that decides the numbers of this run; `sharing` processes hold parts of a row."""
    training = {k: v for k, v in dataclasses.asdict(recipe.train).items() if k not in FREE}
    settings = {"adapter": dataclasses.asdict(recipe.adapter), "train": training, "packing": recipe.data.packing}
    distribution = recipe.launch.distribution if world > 1 else "none"
    distribution += f", {sharing} to a row" if sharing > 1 else ""
    return {
        "base": base_digest(base),
        "data": read_json(run_dir.data / "report.json")["content_sha256"],
        "world_size": world,
        "distribution": distribution,
        "precision": recipe.train.precision,
        "seed": recipe.seed,
        "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "versions": versions(recipe.engine, recipe.launch.distribution),
    }


def changes(then: dict[str, Any], now: dict[str, Any], allowed: list[str]) -> dict[str, str]:
    """Name -> what is different, of the allowed changes.

    Raises RunError: CKP-002 naming those that are not, CKP-005 where DeepSpeed's parts would be cut otherwise.
    """
    found = {name: _difference(then[name], now[name]) for name in CHANGEABLE if then[name] != now[name]}
    refused = [name for name in found if name not in allowed]
    if refused:
        what = "; ".join(f"{name}: {found[name]}" for name in refused)
        raise RunError(
            "CKP-002",
            f"this run cannot go on as it was begun: {what}",
            "its numbers would not be those of one run",
            f"train.allow_changed=[{','.join(refused)}] beside run=, which the record keeps; or a new run",
        )
    cut = sorted(found.keys() & {"distribution", "world_size"})
    if cut and "deepspeed" in then["distribution"] + now["distribution"]:
        what = "; ".join(f"{name}: {found[name]}" for name in cut)
        why = "with DeepSpeed each process keeps its own part of the optimizer's state, which no other one can take up"
        what = f"this run cannot go on as it was begun: {what}"
        raise RunError("CKP-005", what, why, "the same launch=, or a new run")
    return found


def _difference(then: Any, now: Any) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k))
        return ", ".join(f"{k} {then.get(k, 'none')} is now {now.get(k, 'none')}" for k in keys)
    if isinstance(then, str) and len(then) == 64:
        return "other content"
    return f"{then} is now {now}"
