"""What a sweep has found: a table on the terminal, the same as `sweep.md`, and a plot, `sweep.png`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune.rundir import write_text
from finetune.sweep_folder import STOPPED, Job, Sweep
from finetune.sweep_plot import Point, draw_sweep

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("job", "tuned loss", "base loss", "tuned accuracy", "run")


def show_jobs(jobs: Sequence[Job], console: Console) -> None:
    """Prints a table of jobs, the lowest tuned loss first; jobs without scores last, with their exit code."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name)
    for row in rows(jobs):
        table.add_row(*row)
    console.print(table)


def write_results(sweep: Sweep) -> None:
    """Writes sweep.md, and sweep.png as soon as one job has scores, into the sweep's folder."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS), *(" | ".join(row) for row in rows(sweep.jobs))]
    words = f"{sweep.until} -m {' '.join(sweep.words)}" if sweep.words else f"table run={sweep.path}"
    head = f"`python -m finetune {words}`\n\n"
    write_text(sweep.path / "sweep.md", head + "".join(f"| {line} |\n" for line in lines))
    scored = [job for job in sweep.jobs if job.run_dir.scores.is_file()]
    if scored:
        points = [
            Point(settings_of(job.words), job.tuned_loss(), job.exit_code not in (0, *STOPPED)) for job in sweep.jobs
        ]
        draw_sweep(sweep.picture, points, sorted({round(job.base_loss(), 4) for job in scored}))


def rows(jobs: Sequence[Job]) -> list[tuple[str, ...]]:
    """The table's cells, the lowest tuned loss first."""
    return [_row(job) for job in sorted(jobs, key=Job.tuned_loss)]


def settings_of(words: Sequence[str]) -> dict[str, str]:
    """Key -> value of `key=value` words."""
    return {key: value for key, _, value in (word.lstrip("+").partition("=") for word in words)}


def _row(job: Job) -> tuple[str, ...]:
    words, accuracy = " ".join(job.words), job.accuracy()
    failed = job.exit_code not in (0, *STOPPED)
    if not job.run_dir.scores.is_file():
        ended = f"failed, exit code {job.exit_code}" if failed else "not scored" if job.exit_code == 0 else "stopped"
        return words, ended, "", "", str(job.run_dir.path)
    tuned = f"{job.tuned_loss():.4f}" + (f" (exit code {job.exit_code})" if failed else "")
    share = f"{accuracy:.1%}" if accuracy is not None else ""
    return words, tuned, f"{job.base_loss():.4f}", share, str(job.run_dir.path)
