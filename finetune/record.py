"""The record of a finished run: `write_record(run_dir)` writes run.json, which `verify` checks.

Its form is published: `schemas/run.schema.json` in the package. Everything in it that follows from the run's files is
made by `derived`, so that `verify` can make it again and compare.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune import __version__, energy, events, permits, sealed, terms
from finetune.compose import read_recipe
from finetune.compute import compute
from finetune.engine import PACKAGES as UNSLOTH
from finetune.errors import RunError
from finetune.inert import ignored
from finetune.licences import find_licence
from finetune.recipe import Recipe
from finetune.rundir import SIGNATURE, TEMPORARY, RunDir, read_json, sha256_file, write_json

SCHEMA = 2
"""Raised when the layout of run.json changes."""
PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes",
    "tokenizers", "safetensors", "hydra-core", "omegaconf",
)  # fmt: skip
"""Packages whose version decides what a run computes."""


def write_record(run_dir: RunDir) -> None:
    """run.json: what went in and came out, by hash; settings, rows, compute, licences, versions, events.

    Reads every byte of the run folder once. Raises what `base_folder` raises when the base is gone, and RunError:
    REC-001 when an input is not what it was when training began, MRG-015 when adapter, merged files or their copies in
    export/ are not what the merge has proved.
    """
    from finetune.source import base_folder

    recipe = read_recipe(run_dir.recipe)
    record = content(run_dir, recipe, base_folder(recipe))
    if wrong := schema_problems(record):
        raise RunError("REC-002", f"{run_dir.record} would not be a record", "; ".join(wrong), "report this")
    write_json(run_dir.record, record)


def content(run_dir: RunDir, recipe: Recipe, base: Path) -> dict[str, Any]:
    """What run.json holds. `base` is the folder that the base model was loaded from."""
    outputs = hashes(run_dir.path, output_names(run_dir))
    sealed.refuse(run_dir, outputs)
    return {
        "schema": SCHEMA,
        "finetune": __version__,
        "run": run_name(run_dir),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **derived(run_dir, recipe, base),
        "inputs": hashed_inputs(run_dir, recipe, base),
        "outputs": outputs,
        "versions": versions(recipe.engine, recipe.launch.distribution),
        "packages": installed(),
        "platform": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "processors": os.cpu_count(),
            "python": sys.version.split()[0],
        },
        "lock": lock(),
        "git_commit": git_commit(),
    }


def derived(run_dir: RunDir, recipe: Recipe, base: Path) -> dict[str, Any]:
    """The part of the record that follows from the files of the run and the base; the same whenever it is made."""
    data, train, scores = read(run_dir.data / "report.json"), read(run_dir.train), read(run_dir.scores)
    return {
        "recipe": dataclasses.asdict(recipe),
        "seed": recipe.seed,
        "base": {
            "title": recipe.model.title or recipe.model.name,
            "family": recipe.model.family,
            "source": "" if recipe.model.tiny else recipe.model.source,
            "revision": recipe.model.revision,
            "random": recipe.model.tiny,
            "files": sorted(path.name for path in base.iterdir() if path.is_file()),
            "chat_template": chat_template(recipe, base),
            **({"ignored": left} if (left := ignored(base)) else {}),
        },
        "rows": rows(data),
        "data": data,
        "training": training(train),
        "metrics": metrics(scores),
        "parity": read(run_dir.parity),
        "compute": compute(recipe, train) if train else None,
        "energy": energy.used(events.events(run_dir)),
        "licences": licences(run_dir, recipe, base),
        "allowed": read(run_dir.allowed) or [],
        "events": events.head(run_dir),
    }


def chat_template(recipe: Recipe, base: Path) -> dict[str, str]:
    """The hash of the base's chat template, and the published one that it is, where TRL's collection has it."""
    from finetune.foreign.templates import about

    found = about(base)
    return {"sha256": found.sha256, "known_as": found.known_as, "pinned": recipe.model.chat_template_sha256}


def rows(report: dict[str, Any] | None) -> dict[str, Any] | None:
    """How many rows came in, were kept, and why others were not."""
    if report is None:
        return None
    splits = {name: part["rows"] for name, part in report["splits"].items()}
    return {"read": report["rows_read"], "kept": report["kept"], "dropped": report["dropped"], "splits": splits}


def training(train: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the training took, from train.json."""
    if train is None:
        return None
    names = ("tokens", "trainable_tokens", "seconds", "device", "processes", "distribution", "peak_memory_gib")
    shared = ("processes_per_row",) if "processes_per_row" in train else ()  # older runs have none
    return {"steps": len(train["steps"])} | {name: train[name] for name in (*names, *shared)}


def metrics(scores: dict[str, Any] | None) -> dict[str, Any] | None:
    """Base and tuned on the held-out rows, and what the gates said."""
    if scores is None:
        return None
    sides = ("loss", "accuracy", "low", "high")
    right = {name: {k: v for k, v in scores[name].items() if k in sides} for name in ("base", "tuned")}
    asked = {name: scores.get(name) for name in ("forgetting", "safety")}  # older runs have neither
    lost = {name: told["verdict"] if told else None for name, told in asked.items()}
    return right | lost | {"rows": scores["rows"], "gates": scores["gates"], "verdict": scores["verdict"]}


def licences(run_dir: RunDir, recipe: Recipe, base: Path) -> dict[str, Any]:
    """The licence of the base and its text, what its rules said, and the licence of the rows."""
    licence = find_licence(terms.key_of(recipe))
    text = permits.licence_text(base)
    report = read(run_dir.data / "report.json")
    source = report["source"] if report else {}
    told = ("title", "kind", "card", "licence", "attribution")
    return {
        "base": recipe.model.licence,
        "title": licence.title if licence else "",
        "url": recipe.model.licence_url or (licence.source if licence else ""),
        "duties": list(licence.duties) if licence else [],
        "text": {"file": text.file, "sha256": text.sha256} if text else None,
        "said": dataclasses.asdict(recipe.licence),
        "accepted": permits.accepted_in(run_dir),
        "applies": terms.applies(recipe),
        "verdicts": [
            {"rule": v.rule, "passed": v.passed, "what": v.what, "source": v.source}
            for v in permits.verdicts(recipe, base, permits.accepted_in(run_dir))
        ],
        "rows": {name: source[name] for name in told if name in source},
    }


def note_inputs(run_dir: RunDir, recipe: Recipe, base: Path) -> None:
    """Hashes every input and keeps that as inputs.json: what training is about to read."""
    found = {str(path): _stat(path) | {"sha256": sha256_file(path)} for path in input_files(recipe, base)}
    write_json(run_dir.inputs, found)


def hashed_inputs(run_dir: RunDir, recipe: Recipe, base: Path) -> dict[str, str]:
    """Path -> hash of every input, as it was when training began. Raises RunError (REC-001) if one has changed since.

    A file whose size and time are those of then is not read again; `verify` reads all of them.
    """
    then = read(run_dir.inputs) or {}
    found: dict[str, str] = {}
    changed = []
    for path in input_files(recipe, base):
        name = str(path)
        found[name] = _sha256(path, then)
        if name in then and then[name]["sha256"] != found[name]:
            changed.append(name)
    if changed or set(then) - set(found):
        names = ", ".join([*changed, *sorted(set(then) - set(found))])
        why = "the record would name bytes that nothing was trained on"
        raise RunError("REC-001", f"changed or gone since training began: {names}", why, "the files as they were")
    return found


def changed_inputs(run_dir: RunDir, folder: Path) -> dict[str, str]:
    """Name -> hash of what has changed in `folder` since training began. Reads no more than `hashed_inputs` does."""
    then = read(run_dir.inputs) or {}
    known = [path for path in sorted(folder.absolute().iterdir()) if str(path) in then]
    now = {path: _sha256(path, then) for path in known}
    return {path.name: sha256 for path, sha256 in now.items() if sha256 != then[str(path)]["sha256"]}


def input_files(recipe: Recipe, base: Path) -> list[Path]:
    """Every file that the run reads: of the base, and the user's own rows."""
    from finetune.data.files import sources

    files = [source.path for source in sources([*recipe.data.train_files, *recipe.data.heldout_files])]
    return sorted({p.absolute() for p in (*base.iterdir(), *files) if p.is_file()})


def hashes(folder: Path, names: list[str]) -> dict[str, str]:
    """Name -> hash of files below a folder. Those that share bytes on disk, as export and merged, are read once."""
    known: dict[tuple[int, int], str] = {}
    found = {}
    for name in names:
        stat = (folder / name).stat()
        place = (stat.st_dev, stat.st_ino)
        if place not in known:
            known[place] = sha256_file(folder / name)
        found[name] = known[place]
    return found


def output_names(run_dir: RunDir) -> list[str]:
    """Paths in the run folder that the record covers.

    Not itself, the events (it holds their end), signatures, logs, checkpoints, the lock, and, at the top, what is not
    finished.
    """
    names = []
    signature = run_dir.export / SIGNATURE
    apart = (run_dir.record, run_dir.signature, signature, run_dir.events, run_dir.path / ".lock", run_dir.requeue)
    for path in run_dir.path.rglob("*"):
        top = path.relative_to(run_dir.path).parts[0]  # below it nothing is excused by its name
        logged = not {run_dir.logs, run_dir.checkpoints}.isdisjoint(path.parents)
        logged |= path.parent == run_dir.path and path.suffix == ".log"
        unfinished = run_dir.scoring in path.parents or top.startswith(TEMPORARY)
        if path.is_file() and path not in apart and not logged and not unfinished:
            names.append(path.relative_to(run_dir.path).as_posix())
    return sorted(names)


def schema_problems(record: Any) -> list[str]:
    """Where a record is not of the published form, a phrase each."""
    found = sorted(validator().iter_errors(record), key=lambda error: [str(part) for part in error.path])
    return [f"{'.'.join(map(str, error.path)) or 'run.json'}: {error.message[:200]}" for error in found]


@cache
def validator() -> Any:
    """The published schema of run.json, ready to check one."""
    from jsonschema import Draft202012Validator

    schema = json.loads((Path(__file__).parent / "schemas" / "run.schema.json").read_text(encoding="utf-8"))
    return Draft202012Validator(schema)


def run_name(run_dir: RunDir) -> str:
    """What a run is called: recipe and number."""
    path = run_dir.path.absolute()
    return f"{path.parent.name}/{path.name}"


def read(path: Path) -> Any:
    """The JSON value in a file, or None where there is none."""
    return read_json(path) if path.is_file() else None


def versions(engine: str = "finetune", distribution: str = "ddp") -> dict[str, str]:
    """Package -> version, of those that are installed; with those of the engine that trains, and DeepSpeed's."""
    found = {}
    more = [*(UNSLOTH if engine == "unsloth" else ()), *(["deepspeed"] if distribution == "deepspeed" else [])]
    for package in (*PACKAGES, *more):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def installed() -> dict[str, str]:
    """Every package that Python finds here -> its version."""
    found = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    return {name: found[name] for name in sorted(name for name in found if name)}


def lock() -> dict[str, Any]:
    """The hash of the lock that this checkout installs from; null where the program is installed without it."""
    path = _checkout() / "requirements.lock"
    if not (path.is_file() and (path.parent / "pyproject.toml").is_file()):
        return {"file": None, "sha256": None}
    return {"file": path.name, "sha256": sha256_file(path)}


def git_commit() -> str | None:
    """Commit of the checkout this program runs from, `+changes` after it where files differ; None outside one."""
    root = _checkout()
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _checkout() -> Path:
    return Path(__file__).resolve().parent.parent


def _sha256(path: Path, then: dict[str, Any]) -> str:
    """The hash of a file: the one of then, where size and time are those of then."""
    known = then[str(path)] if str(path) in then else {}
    return str(known["sha256"]) if known and known == known | _stat(path) else sha256_file(path)


def _stat(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()
