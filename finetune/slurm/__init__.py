"""Stages as jobs of a Slurm cluster: `queue(runs, stages)` submits them, `preflight(recipe)` says whether it can.

`train.sh` is what a training job does on its first node, `later.sh` any other stage, `table.sh` the end of a sweep.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from finetune.compose import read_recipe
from finetune.errors import RunError
from finetune.recipe import Recipe
from finetune.rundir import RunDir, read_json, write_json, write_text
from finetune.slurm import client
from finetune.slurm.script import Place, later_script, table_script, train_script


@dataclass(frozen=True, slots=True)
class Queued:
    """A stage that has become a job."""

    stage: str
    """Its name."""
    job: str
    """Slurm's id of the job, or of the array."""
    log: Path
    """What it prints, from when it begins; of an array, with `%a` for the number of the task."""


def preflight(recipe: Recipe) -> list[str]:
    """Notes about the cluster. Raises RunError when Slurm is not at hand or would refuse the jobs; submits nothing."""
    place = Place(name=recipe.name, python=sys.executable, run=Path(recipe.runs_dir).expanduser())
    return client.preflight(recipe.launch, (train_script(place, recipe.launch), later_script(place, recipe.launch)))


def refuse_queued(run_dir: RunDir) -> None:
    """Nothing, or RunError (SLM-005) when jobs of this run are queued or running."""
    if not run_dir.slurm.is_file():
        return
    jobs = {job["id"]: stage for stage, job in read_json(run_dir.slurm)["jobs"].items()}
    if living := client.alive(list(jobs)):
        listed = ", ".join(f"{id} ({jobs[id]}, {state.lower()})" for id, state in living.items())
        raise RunError(
            "SLM-005",
            f"{run_dir.path} has jobs already: {listed}",
            "two of them would work on one folder",
            f"wait for them, or: scancel {' '.join(living)}",
        )


def queue(run_dirs: Sequence[RunDir], stages: Sequence[str], links: Path | None = None) -> list[Queued]:
    """The jobs that carry out these stages one after the other, each only if the one before it went well.

    Several run folders become arrays, one task each, found through `links`: stage by stage each task waits for its own.
    The jobs are held until slurm.json says which they are. Raises RunError when a run has jobs already, when it is in
    use, or when Slurm refuses a job: then none is left behind.
    """
    recipe = read_recipe(run_dirs[0].recipe)
    folder, tasks = (links.absolute(), len(run_dirs)) if links else (run_dirs[0].path.absolute(), 0)
    place = Place(name=recipe.name, python=sys.executable, run=folder, tasks=tasks)
    with ExitStack() as stack:
        for run_dir in run_dirs:
            stack.enter_context(run_dir.lock())
            refuse_queued(run_dir)
            write_text(run_dir.job, train_script(place, recipe.launch))
            write_text(run_dir.later, later_script(place, recipe.launch))
        queued: list[Queued] = []
        try:
            for stage in stages:
                queued.append(_send(stage, run_dirs[0], place, queued))
            for number, run_dir in enumerate(run_dirs):
                _note(run_dir, queued, f"_{number}" if links else "")
        except BaseException:
            client.cancel([job.job for job in queued])
            raise
    if queued:
        client.release([queued[0].job])
    return queued


def queue_table(links: Path, jobs: Sequence[Queued], recipe: Recipe) -> Queued:
    """The job that writes what the runs in `links` have found, when all of `jobs` have ended, however they did.

    Raises RunError when Slurm refuses it.
    """
    place = Place(name=recipe.name, python=sys.executable, run=links.absolute())
    script = links / "table.sbatch"
    write_text(script, table_script(place, recipe.launch))
    after = ":".join(job.job for job in jobs)
    job = client.send(str(script), options=[f"--job-name={recipe.name}-table", f"--dependency=afterany:{after}"])
    return Queued("table", job, Path(place.log("table").replace("%j", job)))


def _send(stage: str, run_dir: RunDir, place: Place, before: Sequence[Queued]) -> Queued:
    script, words = (run_dir.job, ()) if stage == "train" else (run_dir.later, (stage,))
    after = "aftercorr" if place.tasks else "afterok"
    waits = [f"--dependency={after}:{before[-1].job}", "--kill-on-invalid-dep=yes"] if before else ["--hold"]
    named = [f"--job-name={place.name}-{stage}", f"--output={place.log(stage)}"]
    job = client.send(str(script), *words, options=[*named, *waits])
    return Queued(stage, job, Path(place.log(stage).replace("%j", job).replace("%A", job)))


def _note(run_dir: RunDir, queued: Iterable[Queued], task: str) -> None:
    """Writes slurm.json: which jobs work on the run."""
    jobs = {job.stage: {"id": job.job + task, "log": job.log.name} for job in queued}
    submitted = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(run_dir.slurm, {"submitted": submitted, "jobs": jobs})


def script_of(run_dir: RunDir) -> Path:
    """The batch script of this run's training, written into its folder: for a job that is there already."""
    recipe = read_recipe(run_dir.recipe)
    place = Place(name=recipe.name, python=sys.executable, run=run_dir.path.absolute())
    write_text(run_dir.job, train_script(place, recipe.launch))
    return run_dir.job
