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
from finetune.record import changed_inputs, versions
from finetune.rundir import RunDir, read_json
from finetune.source import base_digest

FREE = {"allow_changed", "save_steps", "keep_checkpoints", "report_to", "rehearse_memory"}
"""Training settings that change no number."""


def identity(recipe: Recipe, run_dir: RunDir, base: Path, world: int, sharing: int = 1) -> dict[str, Any]:
    """Name -> value, of everything that decides the numbers of this run; `sharing` processes hold parts of a row."""
    adapter, train = dataclasses.asdict(recipe.adapter), dataclasses.asdict(recipe.train)
    settings = {f"adapter.{name}": value for name, value in adapter.items()}
    settings |= {f"train.{name}": value for name, value in train.items() if name not in FREE | {"precision"}}
    distribution = recipe.launch.distribution if world > 1 else "none"
    distribution += f", {sharing} to a row" if sharing > 1 else ""
    return {
        "base": _base(run_dir, base),
        "data": read_json(run_dir.data / "report.json")["content_sha256"],
        "world_size": world,
        "distribution": distribution,
        "precision": recipe.train.precision,
        "seed": recipe.seed,
        "settings": settings | {"data.packing": recipe.data.packing},
        "versions": versions(recipe.engine, recipe.launch.distribution),
    }


def changes(
    then: dict[str, Any], now: dict[str, Any], allowed: list[str], run: str = "runs/NAME/0001"
) -> dict[str, str]:
    """Name -> what is different, of the allowed changes. `run` is the path of the run, for what is to be typed.

    Raises RunError: CKP-002 naming those that are not, CKP-005 where DeepSpeed's parts would be cut otherwise.
    """
    found = {name: _difference(then[name], now[name]) for name in CHANGEABLE if not _same(name, then, now)}
    if "world_size" in found and "none" in (then["distribution"], now["distribution"]):
        found.pop("distribution", None)  # one process has none: the number of processes says it
    refused = [name for name in found if name not in allowed]
    if refused:
        what = "; ".join(f"{name}: {found[name]}" for name in refused)
        raise RunError(
            "CKP-002",
            f"this run cannot go on as it was begun: {what}",
            "its numbers would not be those of one run",
            f"python -m finetune run={run} train.allow_changed=[{','.join(refused)}], which the record keeps; "
            "or a new run",
        )
    cut = sorted(found.keys() & {"distribution", "world_size"})
    if cut and "deepspeed" in then["distribution"] + now["distribution"]:
        what = "; ".join(f"{name}: {found[name]}" for name in cut)
        why = "with DeepSpeed each process keeps its own part of the optimizer's state, which no other one can take up"
        what = f"this run cannot go on as it was begun: {what}"
        raise RunError("CKP-005", what, why, "the same launch=, or a new run")
    return found


def _base(run_dir: RunDir, base: Path) -> str:
    """The base's digest, or which of its files have other bytes than when training began.

    Files whose size and time are those of then are not read again: a byte that changes behind both `verify` finds.
    """
    changed = changed_inputs(run_dir, base)
    names = ", ".join(f"{name} (sha256 {sha256[:12]})" for name, sha256 in changed.items())
    return f"other bytes than when training began in {names}" if changed else base_digest(base)


def _same(name: str, then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a value is that of the checkpoint; older ones hold a hash of their settings."""
    if name == "settings" and isinstance(then[name], str) and isinstance(now[name], dict):
        return bool(then[name] == _hash(now[name], now["precision"]))
    return bool(then[name] == now[name])


def _hash(settings: dict[str, Any], precision: str) -> str:
    """What checkpoints had in place of the settings before they named them."""

    def below(group: str) -> dict[str, Any]:
        return {k.removeprefix(group): value for k, value in settings.items() if k.startswith(group)}

    training = below("train.") | {"precision": precision}
    tree = {"adapter": below("adapter."), "train": training, "packing": settings["data.packing"]}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _difference(then: Any, now: Any) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted(k for k in then.keys() | now.keys() if then.get(k) != now.get(k))
        return ", ".join(f"{k} {then.get(k, 'none')} is now {now.get(k, 'none')}" for k in keys)
    if isinstance(then, str) and len(then) == 64:
        return now if isinstance(now, str) and len(now) != 64 else "other content"
    return f"{then} is now {now}"
