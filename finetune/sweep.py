"""Several jobs one after another, each in a run folder and a process of its own, and a table of their scores."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.compose import compose, expand_sweep, read_recipe
from finetune.errors import RecipeError, RunError
from finetune.keys import flatten, settings
from finetune.machine import settled
from finetune.recipe import Recipe
from finetune.run import STAGES, refuse, start
from finetune.rundir import RunDir
from finetune.sweep_folder import Job, Sweep, create_sweep, read_sweep, refuse_again
from finetune.sweep_table import show_jobs, write_results

if TYPE_CHECKING:
    from rich.console import Console


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

    `sweep=PATH` alone continues a sweep: jobs that finished are left alone. `carry_out` takes the words of one job.
    Raises RecipeError with the problems of all jobs before the first starts.
    """
    found = to_continue(words)
    if found is None:
        variants, recipes = composed(words, config_dir)
        if recipes[0].launch.kind == "slurm":
            return queue(recipes, until, console)
        found = begin(words, until, variants, recipes)
    try:
        found = carry_out_jobs(found, console, carry_out)
    finally:
        found = read_sweep(found.path)  # also what was done before Ctrl-C
        show_jobs(found.jobs, console)
        console.print(f"sweep: {found.path}", markup=False, highlight=False, soft_wrap=True)
        if any(job.exit_code != 0 for job in found.jobs):
            console.print(f"to continue: {found.how_to_continue()}", markup=False, highlight=False, soft_wrap=True)
    return next((job.exit_code for job in found.jobs if job.exit_code), 0)


def to_continue(words: Sequence[str]) -> Sweep | None:
    """The sweep of `sweep=PATH`, None where the words are those of a new one. Raises RecipeError where both are."""
    given = [word.partition("=")[2] for word in words if word.startswith("sweep=")]
    if not given:
        return None
    if len(words) > 1:
        raise RecipeError(
            [f"SWP-003 a sweep keeps its settings. Type: python -m finetune -m sweep={given[0]}, nothing beside it."]
        )
    return read_sweep(Path(given[0]))


def composed(words: Sequence[str], config_dir: str | None) -> tuple[list[list[str]], list[Recipe]]:
    """The words of every job and its recipe. Raises RecipeError with the problems of all."""
    variants = expand_sweep(words)
    recipes, problems = [], []
    for variant in variants:
        try:
            recipe = compose(variant, config_dir)
            refuse(recipe)
            recipes.append(recipe)
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return variants, recipes


def begin(words: Sequence[str], until: str, variants: Sequence[list[str]], recipes: Sequence[Recipe]) -> Sweep:
    """A new sweep with a run folder for every job. Raises RecipeError where the same words are under way."""
    refuse_again(Path(recipes[0].runs_dir).expanduser() / recipes[0].name, words, until)
    jobs = []
    for variant, recipe in zip(variants, recipes, strict=True):
        differs = tuple(word for word in variant if not all(word in other for other in variants))
        jobs.append(Job(differs, start(recipe, until), None))
    return create_sweep(words, until, jobs)


def carry_out_jobs(found: Sweep, console: Console, carry_out: Callable[[list[str]], int]) -> Sweep:
    """The sweep after every job that was not finished has run once; Ctrl-C ends all of it."""
    for number, job in enumerate(found.jobs):
        told = f"job {number + 1} of {len(found.jobs)}: {' '.join(job.words)} in {job.run_dir.path}"
        if job.exit_code == 0:
            console.print(f"{told}: done before", markup=False, highlight=False, soft_wrap=True)
            continue
        console.print(told, markup=False, highlight=False, soft_wrap=True)
        found = found.with_job(number, carry_out([found.until, f"run={job.run_dir.path}"]))
        write_results(found)
        if found.jobs[number].exit_code in (130, -2, 75):  # Ctrl-C reached the child: the user means the whole sweep
            break
    return found


def queue(recipes: Sequence[Recipe], until: str, console: Console) -> int:
    """Queues the jobs as Slurm arrays, one task per job, and behind them one that writes the table; gives 0."""
    from finetune import slurm
    from finetune.submit import link_folder, ready, submit

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    ready([settled(recipe) for recipe in recipes], say)
    run_dirs = [start(recipe, until) for recipe in recipes]
    links = link_folder(run_dirs)
    for number, run_dir in enumerate(run_dirs):
        say(f"task {number}: {run_dir.path}")
    queued = submit(run_dirs, until, say, links)
    if queued and until not in ("data", "train"):
        try:
            job = slurm.queue_table(links, queued, recipes[0])
            say(f"table  job {job.job}, when all of these have ended: {links / 'sweep.md'} and sweep.png")
        except RunError as error:  # a partition may refuse a job without a GPU; the sweep goes on without it
            say(f"note: the table has no job of its own: {error.sentence()}")
    say(f"scores so far, at any time: python -m finetune table run={links}")
    return 0


def tabled(folder: Path, console: Console) -> Sweep:
    """The runs in a folder as a sweep: their table is printed, and written there with sweep.json and sweep.png.

    Raises RunError where there are no runs, OSError where nothing can be written.
    """
    found = Sweep(folder.resolve(), (), list(STAGES)[-1], tuple(jobs_in(folder)))
    show_jobs(found.jobs, console)
    found.write()
    write_results(found)
    return found


def jobs_in(folder: Path) -> list[Job]:
    """A job for every run in a folder, with the settings in which it differs. Raises RunError where there are none."""
    run_dirs = [RunDir(path.parent.resolve()) for path in sorted(folder.glob("*/recipe.yaml"))]
    if not run_dirs:
        raise RunError(
            "RUN-004", f"run={folder} has no run folders in it", "", "run=runs/NAME, or the folder array-0001 in it"
        )
    known = settings(Recipe)
    flat = [dict(flatten(asdict(read_recipe(run_dir.recipe)), known)) for run_dir in run_dirs]
    differ = [key for key in known if any(tree[key] != flat[0][key] for tree in flat)]
    words = [tuple(f"{key}={tree[key]}" for key in differ) for tree in flat]
    return [Job(own, run_dir, 0) for own, run_dir in zip(words, run_dirs, strict=True)]
