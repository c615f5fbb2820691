"""Runs a recipe once and writes what it took: seconds per stage, memory, and how well it learnt.

    .venv/bin/python scripts/bench_quickstart.py [recipe=legal_quickstart] [key=value ...]
    .venv/bin/python scripts/bench_quickstart.py run=runs/legal_quickstart/0001      of a run that was just made

Writes scripts/bench_results/<recipe>_<machine>.json and prints it. Run it alone: other work makes it slower. With
export=servers it also has how near each server's answers came (after `bash scripts/setup_serving.sh`).
"""

from __future__ import annotations

import json
import platform
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.compose import load_recipe, read_recipe
from finetune.events import events
from finetune.run import run
from finetune.rundir import RunDir, open_run, read_json, write_json

RESULTS = Path(__file__).parent / "bench_results"


def main(words: list[str]) -> None:
    """Runs the job, or opens the run that is named, and writes its figures."""
    given = dict(word.split("=", 1) for word in words)
    if "run" in given:
        done = open_run(given["run"])
    else:
        name = given.pop("recipe", "legal_quickstart")
        done = run(load_recipe(name, *(f"{key}={value}" for key, value in given.items())))
    figures = told(done)
    slug = re.sub(r"[^a-z0-9]+", "-", figures["machine"].lower()).strip("-")
    write_json(RESULTS / f"{figures['recipe']}_{slug}.json", figures)
    print(json.dumps(figures, indent=2))


def told(done: RunDir) -> dict[str, Any]:
    """Every figure of a finished run."""
    train, scores, record = (read_json(path) for path in (done.train, done.scores, done.record))
    seconds = seconds_by_stage(done)
    return {
        "recipe": read_recipe(done.recipe).name,
        "seconds": sum(seconds.values()),
        "seconds_by_stage": seconds,
        "training": {
            key: train[key] for key in ("rows", "tokens", "seconds", "resident_gib", "load_peak_gib", "peak_memory_gib")
        },
        "base": scores["base"],
        "tuned": scores["tuned"],
        "majority": scores["majority"],
        "tests": scores["tests"],
        "verdict": scores["verdict"],
        "forgetting": _told(scores["forgetting"], "sets", "change", "low", "high", "test"),
        "safety": _told(scores["safety"], "base", "tuned", "refused_by_draw", "tests"),
        "parity": read_json(done.export / "parity.json"),
        "clients": read_json(done.export / "clients.json"),
        "machine": machine(),
        "date": record["written"][:10],
        "versions": train["versions"],
    }


def seconds_by_stage(done: RunDir) -> dict[str, int]:
    """Whole seconds of each stage, by the run's own events."""
    begun: dict[str, datetime] = {}
    found: dict[str, int] = {}
    for event in events(done):
        when = datetime.fromisoformat(event["when"])
        if event["what"] == "started":
            begun[event["stage"]] = when
        elif event["what"] == "finished":
            found[event["stage"]] = round((when - begun[event["stage"]]).total_seconds())
    return found


def _told(part: dict[str, Any] | None, *names: str) -> dict[str, Any] | None:
    return None if part is None else {name: part[name] for name in names}


def machine() -> str:
    """Processor and cores of this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    cores = sum(line.startswith("processor") for line in lines)
    return f"{model}, {cores} cores"


if __name__ == "__main__":
    main(sys.argv[1:])
