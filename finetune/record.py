"""The record of a finished run: `write_record(run_dir)` writes run.json, which `verify` checks."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.compose import read_recipe
from finetune.engine import PACKAGES as UNSLOTH
from finetune.licences import find_licence
from finetune.recipe import Recipe
from finetune.rundir import TEMPORARY, RunDir, read_json, sha256_file, write_json

SCHEMA = 1
"""Raised when the layout of run.json changes."""
PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes",
    "tokenizers", "safetensors", "hydra-core", "omegaconf",
)  # fmt: skip
"""Packages whose version decides what a run computes."""


def write_record(run_dir: RunDir) -> None:
    """run.json: sha256 of every input and output, versions, seed, licences, platform, and the recipe.

    Reads every byte of the base and of the run folder once. Raises what `base_folder` raises when the base is gone.
    """
    from finetune.source import base_folder

    recipe = read_recipe(run_dir.recipe)
    write_json(run_dir.record, content(run_dir, recipe, base_folder(recipe)))


def content(run_dir: RunDir, recipe: Recipe, base: Path) -> dict[str, Any]:
    """What run.json holds. `base` is the folder that the base model was loaded from."""
    from finetune.data.files import sources

    files = [source.path for source in sources([*recipe.data.train_files, *recipe.data.heldout_files])]
    inputs = sorted({p.absolute() for p in (*base.iterdir(), *files) if p.is_file()})
    report = run_dir.data / "report.json"
    licence = find_licence(recipe.model.licence)
    return {
        "schema": SCHEMA,
        "finetune": __version__,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "recipe": dataclasses.asdict(recipe),
        "seed": recipe.seed,
        "inputs": {str(path): sha256_file(path) for path in inputs},
        "outputs": {name: sha256_file(run_dir.path / name) for name in output_names(run_dir)},
        "data": read_json(report) if report.is_file() else None,
        "licences": {
            "base": recipe.model.licence,
            "title": licence.title if licence else "",
            "url": recipe.model.licence_url or (licence.source if licence else ""),
            "duties": list(licence.duties) if licence else [],
        },
        "versions": versions(recipe.engine),
        "platform": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "processors": os.cpu_count(),
            "python": sys.version.split()[0],
        },
        "git_commit": git_commit(),
    }


def output_names(run_dir: RunDir) -> list[str]:
    """Paths in the run folder that the record covers: not itself, logs, checkpoints, the lock, unfinished files."""
    names = []
    for path in run_dir.path.rglob("*"):
        left_out = (
            path in (run_dir.record, run_dir.path / ".lock", run_dir.requeue)
            or not {run_dir.logs, run_dir.checkpoints}.isdisjoint(path.parents)
            or path.suffix == ".log"
        )
        unfinished = any(part.startswith(TEMPORARY) for part in path.relative_to(run_dir.path).parts)
        if path.is_file() and not left_out and not unfinished:
            names.append(path.relative_to(run_dir.path).as_posix())
    return sorted(names)


def versions(engine: str = "finetune") -> dict[str, str]:
    """Package -> version, of those that are installed; with those of the engine that trains."""
    found = {}
    for package in (*PACKAGES, *(UNSLOTH if engine == "unsloth" else ())):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the checkout this program runs from, `+changes` after it where files differ; None outside one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()
