"""Several jobs one after another, each in a run folder and a process of its own, and a table of their scores."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.compose import compose, expand_sweep, read_recipe
from finetune.errors import RecipeError, RunError
from finetune.keys import flatten, settings
from finetune.machine import settled
from finetune.recipe import Recipe
from finetune.run import refuse, start
from finetune.rundir import RunDir, read_json

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Job:
    """One finished or failed job of a sweep."""

    words: tuple[str, ...]
    """The words in which it differs from the others."""
    run_dir: RunDir
    """Its run folder."""
    exit_code: int
    """What its process returned; 0 means finished."""


def process(words: list[str]) -> int:
    """The exit code of `python -m finetune` with these words, in a process of its own."""
    return subprocess.run([sys.executable, "-m", "finetune", *words], check=False).returncode


def sweep(
    words: Sequence[str],
    config_dir: str | None,
    until: str,
    console: Console,
    carry_out: Callable[[list[str]], int] = process,
) -> int:
    """Carries out every job of the words and prints their scores; gives the first exit code that is not 0.

    `carry_out` takes the words of one job. Raises RecipeError with the problems of all jobs before the first starts.
    """
    variants = expand_sweep(words)
    recipes, found = [], []
    for variant in variants:
        try:
            recipe = compose(variant, config_dir)
            refuse(recipe)
            recipes.append(recipe)
        except RecipeError as error:
            found += error.problems
    if found:
        raise RecipeError(list(dict.fromkeys(found)))
    if recipes[0].launch.kind == "slurm":
        return queue(recipes, until, console)
    jobs = []
    for number, (variant, recipe) in enumerate(zip(variants, recipes, strict=True), 1):
        differs = tuple(word for word in variant if not all(word in other for other in variants))
        run_dir = start(recipe)
        console.print(
            f"job {number} of {len(variants)}: {' '.join(differs)} in {run_dir.path}", markup=False, highlight=False
        )
        jobs.append(Job(differs, run_dir, carry_out([until, f"run={run_dir.path}"])))
        if jobs[-1].exit_code in (130, -2):  # Ctrl-C reached the child: the user means the whole sweep
            break
    show_jobs(jobs, console)
    return next((job.exit_code for job in jobs if job.exit_code), 0)


def queue(recipes: Sequence[Recipe], until: str, console: Console) -> int:
    """Queues the jobs as Slurm arrays, one task per job, and prints how to see their scores later; gives 0."""
    from finetune.submit import link_folder, ready, submit

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    ready([settled(recipe) for recipe in recipes], say)
    run_dirs = [start(recipe) for recipe in recipes]
    links = link_folder(run_dirs)
    for number, run_dir in enumerate(run_dirs):
        say(f"task {number}: {run_dir.path}")
    submit(run_dirs, until, say, links)
    say(f"scores, later: python -m finetune table run={links}")
    return 0


def jobs_in(folder: Path) -> list[Job]:
    """A job for every run in a folder, with the settings in which it differs. Raises RunError where there are none."""
    run_dirs = [RunDir(path.parent.resolve()) for path in sorted(folder.glob("*/recipe.yaml"))]
    if not run_dirs:
        raise RunError("RUN-004", f"run={folder} has no run folders in it", "", "run=runs/NAME, or a sweep's folder")
    known = settings(Recipe)
    flat = [dict(flatten(asdict(read_recipe(run_dir.recipe)), known)) for run_dir in run_dirs]
    differ = [key for key in known if any(tree[key] != flat[0][key] for tree in flat)]
    words = [tuple(f"{key}={tree[key]}" for key in differ) for tree in flat]
    return [Job(own, run_dir, 0) for own, run_dir in zip(words, run_dirs, strict=True)]


def show_jobs(jobs: Sequence[Job], console: Console) -> None:
    """Prints a table of jobs, the lowest tuned loss first; jobs without scores last, with their exit code."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("job", "tuned loss", "base loss", "tuned accuracy", "run"):
        table.add_column(name)
    for job in sorted(jobs, key=tuned_loss):
        scores = read_json(job.run_dir.scores) if job.run_dir.scores.is_file() else None
        accuracy = scores["tuned"]["accuracy"] if scores else None
        table.add_row(
            " ".join(job.words),
            f"{scores['tuned']['loss']:.4f}"
            if scores
            else f"failed, exit code {job.exit_code}"
            if job.exit_code
            else "not scored",
            f"{scores['base']['loss']:.4f}" if scores else "",
            f"{accuracy:.1%}" if accuracy is not None else "",
            str(job.run_dir.path),
        )
    console.print(table)


def tuned_loss(job: Job) -> float:
    """Held-out loss of the tuned model; infinity when the job has no scores."""
    file: Path = job.run_dir.scores
    return float(read_json(file)["tuned"]["loss"]) if file.is_file() else float("inf")
