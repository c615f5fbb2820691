"""A run, or the runs of a sweep, as Slurm jobs: rows are prepared here, everything else is queued, nobody waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from finetune import slurm
from finetune.compose import read_recipe
from finetune.errors import RecipeError, RunError
from finetune.launch import launch as launch_here
from finetune.recipe import Recipe
from finetune.run import STAGES, before_training, carry_on, refuse, require_gates
from finetune.rundir import RunDir
from finetune.slurm import Queued


def ready(recipes: Sequence[Recipe], say: Callable[[str], None]) -> None:
    """Nothing, or the error of what stands in the way of these recipes as one submission, here or on the cluster."""
    for recipe in recipes:
        refuse(recipe)
    if any(recipe.launch != recipes[0].launch for recipe in recipes):
        raise RecipeError(
            ["SLM-007 a sweep over launch.* is no array: its tasks have the same resources. Submit one job per value."]
        )
    for note in slurm.preflight(recipes[0]):
        say(f"note: {note}")


def submit(
    run_dirs: Sequence[RunDir],
    until: str,
    say: Callable[[str], None],
    links: Path | None = None,
    launch: Callable[[str, RunDir], None] = launch_here,
) -> list[Queued]:
    """The jobs of what is not done in these runs, up to the stage `until`; the data stage is carried out before.

    Then the inputs are hashed.

    Several runs become arrays: `links` is a folder with a link to each. Raises what `ready` raises, RunError when jobs
    of a run are queued already, GateError when a run's scores are too low for what is left.
    """
    ready([read_recipe(run_dir.recipe) for run_dir in run_dirs], say)
    for run_dir in run_dirs:
        slurm.refuse_queued(run_dir)
        carry_on(run_dir, until="data", launch=launch)
        if until != "data" and not done(run_dir, "train"):
            before_training(read_recipe(run_dir.recipe), run_dir, until, like=run_dirs[0])
    stages = [stage for stage in _wanted(until) if any(not done(run_dir, stage) for run_dir in run_dirs)]
    for run_dir in run_dirs:
        if run_dir.scores.exists() and set(stages) & {"merge", "export", "report"}:
            require_gates(run_dir)
    queued = slurm.queue(run_dirs, stages, links) if stages else []
    for line in told(queued, run_dirs):
        say(line)
    return queued


def done(run_dir: RunDir, stage: str) -> bool:
    """Whether a stage is done; the last one with the record that follows it."""
    paths = STAGES[stage](run_dir) + ((run_dir.record,) if stage == list(STAGES)[-1] else ())
    return all(path.exists() for path in paths)


def told(queued: Sequence[Queued], run_dirs: Sequence[RunDir]) -> list[str]:
    """What a person needs to know of these jobs."""
    if not queued:
        return ["nothing is left to queue"]
    width = max(len(job.stage) for job in queued)
    size = f" (array of {len(run_dirs)})" if len(run_dirs) > 1 else ""
    return [
        *(
            f"{job.stage:{width}}  job {job.job}{size}{f', after {before.job}' if before else ''}"
            for before, job in zip([None, *queued], queued, strict=False)
        ),
        f"look: squeue --jobs={','.join(job.job for job in queued)}",
        f"log: {queued[0].log}",
        f"stop: scancel {' '.join(job.job for job in queued)}",
    ]


def link_folder(run_dirs: Sequence[RunDir]) -> Path:
    """A new folder beside the first run with a link `0`, `1` ... to each run: how tasks of an array find theirs."""
    parent, number = run_dirs[0].path.absolute().parent, 1
    while True:
        folder = parent / f"array-{number:04d}"
        try:
            folder.mkdir()
            break
        except FileExistsError:
            number += 1
        except OSError as error:
            reason = error.strerror or str(error)
            raise RunError("RUN-001", f"cannot make a folder in {parent}", reason, "runs_dir=/a/folder") from None
    for task, run_dir in enumerate(run_dirs):
        (folder / str(task)).symlink_to(run_dir.path.absolute(), target_is_directory=True)
    return folder


def _wanted(until: str) -> list[str]:
    stages = list(STAGES)
    return stages[1 : stages.index(until) + 1]
