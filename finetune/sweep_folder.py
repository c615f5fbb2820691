"""A sweep on disk, `runs/<recipe>/sweep-<number>/`: its jobs and how they ended, kept as they go; `sweep.json`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.errors import RecipeError, RunError
from finetune.rundir import RunDir, read_json, write_json

STOPPED = (None, 130, -2, 75)
"""Exit codes of jobs that did not come to an end: not begun, or stopped with Ctrl-C."""


@dataclass(frozen=True, slots=True)
class Job:
    """One job of a sweep."""

    words: tuple[str, ...]
    """The words in which it differs from the others."""
    run_dir: RunDir
    """Its run folder."""
    exit_code: int | None
    """What its process returned; 0 means finished, None that it has not run to an end yet."""

    def tuned_loss(self) -> float:
        """Held-out loss of the tuned model; infinity when the job has no scores."""
        file = self.run_dir.scores
        return float(read_json(file)["tuned"]["loss"]) if file.is_file() else float("inf")

    def base_loss(self) -> float:
        """The same of its base."""
        file = self.run_dir.scores
        return float(read_json(file)["base"]["loss"]) if file.is_file() else float("inf")

    def accuracy(self) -> float | None:
        """Share of right answers of the tuned model; None without scores, or where rows have no choices."""
        file = self.run_dir.scores
        share: float | None = read_json(file)["tuned"]["accuracy"] if file.is_file() else None
        return share


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep and where it is kept."""

    path: Path
    """Its folder."""
    words: tuple[str, ...]
    """The words it was started with, lists of values included; none of runs that were queued as Slurm arrays."""
    until: str
    """The last stage of its jobs."""
    jobs: tuple[Job, ...]
    """Its jobs, in the order in which they are carried out."""

    @property
    def picture(self) -> Path:
        """The plot of its scores, there as soon as one job has some."""
        return self.path / "sweep.png"

    def with_job(self, number: int, exit_code: int) -> Sweep:
        """The sweep after its job `number`, from 0, returned `exit_code`; written to disk."""
        jobs = [replace(job, exit_code=exit_code) if n == number else job for n, job in enumerate(self.jobs)]
        after = replace(self, jobs=tuple(jobs))
        after.write()
        return after

    def unfinished(self) -> bool:
        """Whether a job has not come to an end. One that failed has."""
        return any(job.exit_code in STOPPED for job in self.jobs)

    def how_to_continue(self) -> str:
        """The command that carries out what is left, failed jobs once more."""
        return f"python -m finetune -m sweep={self.path}"

    def write(self) -> None:
        """Writes sweep.json: what continuing needs, and each job's scores for whoever reads it."""
        jobs = [
            {
                "words": job.words,
                "run": os.path.relpath(job.run_dir.path, self.path),
                "exit_code": job.exit_code,
                "tuned_loss": job.tuned_loss() if job.run_dir.scores.is_file() else None,
                "base_loss": job.base_loss() if job.run_dir.scores.is_file() else None,
                "tuned_accuracy": job.accuracy(),
            }
            for job in self.jobs
        ]
        write_json(self.path / "sweep.json", {"words": self.words, "until": self.until, "jobs": jobs})


def create_sweep(words: Sequence[str], until: str, jobs: Sequence[Job]) -> Sweep:
    """A new sweep of these jobs, in a folder beside the first one's run. Raises RunError where none can be made."""
    parent = jobs[0].run_dir.path.parent
    number = 1
    while True:
        path = parent / f"sweep-{number:04d}"
        try:
            path.mkdir()
            break
        except FileExistsError:
            number += 1
        except OSError as error:
            raise RunError(
                "RUN-001",
                f"cannot make a folder in {parent}",
                error.strerror or str(error),
                "runs_dir=/a/writable/folder",
            ) from None
    sweep = Sweep(path, tuple(words), until, tuple(jobs))
    sweep.write()
    return sweep


def read_sweep(path: Path) -> Sweep:
    """The sweep in a folder. Raises RunError (SWP-002) when it is none."""
    file = path / "sweep.json"
    if not file.is_file():
        known = ", ".join(sorted(str(found.parent) for found in Path("runs").glob("*/sweep-*/sweep.json"))[-5:])
        raise RunError(
            "SWP-002",
            f"sweep={path} is not the folder of a sweep",
            f"it has no sweep.json; known: {known}" if known else "it has no sweep.json",
            "python -m finetune -m sweep=runs/NAME/sweep-0001",
        )
    kept = read_json(file)
    jobs = [
        Job(tuple(job["words"]), RunDir(Path(os.path.normpath(path / job["run"]))), job["exit_code"])
        for job in kept["jobs"]
    ]
    return Sweep(path, tuple(kept["words"]), kept["until"], tuple(jobs))


def refuse_again(parent: Path, words: Sequence[str], until: str) -> None:
    """Raises RecipeError (SWP-001) when a sweep with the same words is not finished: it can go on."""
    for file in sorted(parent.glob("sweep-*/sweep.json")):
        sweep = read_sweep(file.parent)
        if sweep.words == tuple(words) and sweep.until == until and sweep.unfinished():
            left = sum(job.exit_code in STOPPED for job in sweep.jobs)
            raise RecipeError(
                [
                    f"SWP-001 {sweep.path} has the same jobs, {left} of {len(sweep.jobs)} are left. "
                    f"Type: {sweep.how_to_continue()}, or remove that folder to begin anew."
                ]
            )
