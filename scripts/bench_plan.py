"""How fast every recipe plans from a cold start of Python, and how near its memory is to what a training measures.

    .venv/bin/python scripts/bench_plan.py [--starts 5] [--probe legal_quickstart]

Writes scripts/bench_results/plan_<machine>.json: per recipe the wall-clock seconds of `python -m finetune plan
recipe=NAME --json` in a process of its own, all of them and their median, and how loaded the machine was. With
`--probe NAME` it also trains that recipe for four updates and writes plan_<name>_<machine>.json: what train.json says
of memory, and planned against measured. `--starts 0` leaves the first part out.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from bench_quickstart import RESULTS, machine

from finetune.compare import compare
from finetune.compose import load_recipe, recipe_names
from finetune.machine import settled
from finetune.plan import plan
from finetune.probe import shortened, trained
from finetune.rundir import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
MEMORY = ("resident_gib", "optimizer_gib", "peak_memory_gib", "load_peak_gib", "load_limit_gib", "coverage", "device")
LIMIT_SECONDS = 3.0


def main(words: list[str]) -> None:
    """Runs the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=5, help="cold starts per recipe")
    parser.add_argument("--probe", default="", help="recipe that is trained for four updates")
    options = parser.parse_args(words)
    slug = re.sub(r"[^a-z0-9]+", "-", machine().lower()).strip("-")
    if options.starts:
        write_json(RESULTS / f"plan_{slug}.json", cold_starts(options.starts))
    if options.probe:
        write_json(RESULTS / f"plan_{options.probe}_{slug}.json", probed(options.probe))


def cold_starts(starts: int) -> dict[str, Any]:
    """Recipe -> seconds of each start and their median."""
    load = os.getloadavg()[0]
    recipes = {}
    for name in recipe_names():
        seconds = [cold_start(name) for _ in range(starts)]
        recipes[name] = {"median_seconds": round(statistics.median(seconds), 3), "seconds": seconds}
        print(f"{name}: {recipes[name]['median_seconds']} s", flush=True)
    medians = [figures["median_seconds"] for figures in recipes.values()]
    return {
        "slowest_median_seconds": max(medians),
        "limit_seconds": LIMIT_SECONDS,
        "below_limit": max(medians) < LIMIT_SECONDS,
        "starts": starts,
        "recipes": recipes,
        "load_average": {"before": round(load, 2), "after": round(os.getloadavg()[0], 2)},
        "machine": machine(),
        "date": date.today().isoformat(),
        "python": sys.version.split()[0],
    }


def cold_start(name: str) -> float:
    """Wall-clock seconds of one process that plans a recipe."""
    started = time.monotonic()
    words = [sys.executable, "-m", "finetune", "plan", f"recipe={name}", "--json"]
    subprocess.run(words, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return round(time.monotonic() - started, 3)


def probed(name: str) -> dict[str, Any]:
    """What a recipe's first four updates measured of memory, and the plan beside it."""
    recipe = settled(load_recipe(name))
    with trained(shortened(recipe, 3)) as run_dir:
        train, prepared = read_json(run_dir.train), run_dir.data
        rows = compare(plan(shortened(recipe, 3), prepared=prepared).as_json(), train)
    kept = {key: train[key] for key in MEMORY}
    seconds = [step["seconds"] for step in train["steps"]]
    return {
        "recipe": name,
        "precision": recipe.train.precision,
        "planned_and_measured": [row.as_json() for row in rows if row.unit == "GiB"],
        "seconds_per_update": seconds,
        "train": kept | {"steps": [], "tokens": 0, "seconds": 0.0},
        "load_average": round(os.getloadavg()[0], 2),
        "machine": machine(),
        "date": date.today().isoformat(),
        "versions": train["versions"],
    }


if __name__ == "__main__":
    main(sys.argv[1:])
