"""All that the page of a run shows, from the run's own files: `gather(run_dir)`. None for what is not there yet."""

from __future__ import annotations

import dataclasses
import json
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune import __version__, energy, events, permits, record, terms
from finetune.compare import compare
from finetune.compose import read_recipe
from finetune.errors import FinetuneError
from finetune.licences import find_licence
from finetune.recipe import Recipe
from finetune.rundir import RunDir, read_json
from finetune.start_lines import STARTS

Facts = dict[str, Any]
"""What `gather` gives."""


def gather(run_dir: RunDir) -> Facts:
    """All that the page shows, as plain values: the files of the run as they are, None for those not there yet."""
    recipe = read_recipe(run_dir.recipe)
    stages = left_by(run_dir)
    mask = run_dir.data / "mask.txt"
    plan, train, data = read(run_dir.plan), read(run_dir.train), read(stages["data"])
    happened = events.events(run_dir)
    return {
        "recipe": dataclasses.asdict(recipe),
        "run": str(run_dir.path),
        "name": record.run_name(run_dir),
        "quoted": shlex.quote(str(run_dir.path)),
        "missing": [name for name, path in stages.items() if not path.exists()],
        "plan": plan,
        "data": data,
        "train": train,
        "scores": read(run_dir.scores),
        "compared": [row.as_json() for row in compare(plan, train)] if plan and train else [],
        "mask": mask.read_text(encoding="utf-8") if mask.exists() else "",
        "dropped": dropped(data, run_dir.data / "ledger.jsonl"),
        "parity": read(run_dir.parity) or read(run_dir.export / "parity.json"),
        "clients": read(run_dir.export / "clients.json"),
        "exported": exported(run_dir.export),
        "starts": {name: STARTS[name] for name in recipe.export.formats if name in STARTS},
        "events": happened,
        "stages": stage_seconds(happened),
        "chain": events.head(run_dir),
        "energy": energy.used(happened),
        "inputs": inputs(run_dir),
        "merged": read(run_dir.merged / "merge.json"),
        "versions": train["versions"] if train else record.versions(recipe.engine, recipe.launch.distribution),
        "program": __version__,
        "commit": record.git_commit(),
        **licences(run_dir, recipe),
    }


def left_by(run_dir: RunDir) -> dict[str, Path]:
    """Stage -> what it leaves, of every stage before the report, in their order."""
    first = {"data": run_dir.data / "report.json", "train": run_dir.train, "evaluate": run_dir.scores}
    return first | {"merge": run_dir.merged, "export": run_dir.export}


def licences(run_dir: RunDir, recipe: Recipe) -> Facts:
    """The licence of the base, what its rules say of this run, and what they leave open."""
    licence = find_licence(terms.key_of(recipe))
    told: Facts = {
        "licence": dataclasses.asdict(licence) if licence else None,
        "applies": terms.applies(recipe),
        "verdicts": None,
        "accepted": permits.accepted_in(run_dir),
    }
    try:
        found = permits.verdicts(recipe, base_folder(run_dir), told["accepted"])
    except FinetuneError:  # the data card is gone
        return told
    return told | {"verdicts": [dataclasses.asdict(verdict) for verdict in found]}


def base_folder(run_dir: RunDir) -> Path | None:
    """The folder of the base that the run has read, by its noted inputs; None where it is gone."""
    names = read(run_dir.inputs) or {}
    folders = sorted({Path(name).parent for name in names if Path(name).name == "config.json"})
    return next((folder for folder in folders if folder.is_dir()), None)


def inputs(run_dir: RunDir) -> list[tuple[str, str]]:
    """(folder and name, hash) of every input as training read it."""
    noted = read(run_dir.inputs) or {}
    return [("/".join(Path(name).parts[-2:]), noted[name]["sha256"]) for name in sorted(noted)]


def stage_seconds(happened: list[dict[str, Any]]) -> list[tuple[str, float, str]]:
    """(stage, seconds of all its attempts that ended, how the last one ended), in the order they began.

    An attempt that ended without a word, killed, has no seconds.
    """
    begun: dict[str, datetime] = {}
    took: dict[str, float] = {}
    ended: dict[str, str] = {}
    for event in happened:
        if "stage" not in event:
            continue
        name, when = event["stage"], datetime.fromisoformat(event["when"])
        took.setdefault(name, 0.0)
        if event["what"] in ("started", "continued"):
            begun[name], ended[name] = when, "has not ended"
        elif name in begun:
            took[name] += (when - begun.pop(name)).total_seconds()
            ended[name] = event["what"]
    return [(name, seconds, ended[name] if name in ended else "") for name, seconds in took.items()]


def dropped(data: Any, ledger: Path) -> list[tuple[str, int]]:
    """(why, rows) of the rows that were not kept, most frequent first; from the ledger where the report has none."""
    counts: dict[str, int] = {}
    if data and "dropped" in data:
        counts = dict(data["dropped"])
    elif ledger.exists():
        with ledger.open(encoding="utf-8") as lines:
            for line in lines:
                entry = json.loads(line)
                if not entry["split"]:
                    counts[entry["code"]] = counts.get(entry["code"], 0) + 1
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def exported(folder: Path) -> list[dict[str, Any]]:
    """Every exported file with its size in bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.exists() else []
    return [{"path": str(p.relative_to(folder)), "bytes": p.stat().st_size} for p in files]


def read(path: Path) -> Any:
    """The JSON value in a file, or None where there is none."""
    return read_json(path) if path.is_file() else None
