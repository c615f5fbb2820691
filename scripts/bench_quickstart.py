"""Runs a recipe once and writes what it took: seconds per stage, memory, and how well it learnt.

    .venv/bin/python scripts/bench_quickstart.py [recipe=legal_quickstart] [key=value ...]

Writes scripts/bench_results/<recipe>_<machine>.json and prints it. Run it alone: other work makes it slower. With
export=servers it also has how near each server's answers came (after `bash scripts/setup_serving.sh`).
"""

from __future__ import annotations

import json
import platform
import re
import resource
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from finetune.compose import load_recipe
from finetune.launch import launch
from finetune.run import run
from finetune.rundir import RunDir, read_json, write_json

RESULTS = Path(__file__).parent / "bench_results"


def main(words: list[str]) -> None:
    """Runs the job and writes its figures."""
    name = next((word.removeprefix("recipe=") for word in words if word.startswith("recipe=")), "legal_quickstart")
    recipe = load_recipe(name, *[word for word in words if not word.startswith("recipe=")])
    seconds: dict[str, float] = {}

    def timed(stage: str, run_dir: RunDir) -> None:
        started = time.monotonic()
        launch(stage, run_dir)
        seconds[stage] = round(time.monotonic() - started, 1)

    started = time.monotonic()
    done = run(recipe, launch=timed)
    train, scores, parity = (read_json(p) for p in (done.train, done.scores, done.export / "parity.json"))
    figures = {
        "recipe": name,
        "seconds": round(time.monotonic() - started, 1),
        "seconds_by_stage": seconds,
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "training": {key: train[key] for key in ("rows", "tokens", "seconds", "resident_gib", "load_peak_gib")},
        "base": scores["base"],
        "tuned": scores["tuned"],
        "majority": scores["majority"],
        "tests": scores["tests"],
        "verdict": scores["verdict"],
        "forgetting": _told(scores["forgetting"], "change", "low", "high", "test", "verdict"),
        "safety": _told(scores["safety"], "tests", "different", "verdict"),
        "parity": parity,
        "clients": read_json(done.export / "clients.json"),
        "machine": machine(),
        "date": date.today().isoformat(),
        "versions": train["versions"],
    }
    slug = re.sub(r"[^a-z0-9]+", "-", figures["machine"].lower()).strip("-")
    write_json(RESULTS / f"{name}_{slug}.json", figures)
    print(json.dumps(figures, indent=2))


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
