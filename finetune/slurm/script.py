"""Batch scripts as text: `train_script`, `later_script` and `table_script(place, launch)`. Nothing here needs Slurm."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from finetune.recipe import Launch

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a script finds what it works on."""

    name: str
    """Name of the job, as squeue shows it."""
    python: str
    """The Python that runs the program, the one that submits it."""
    run: Path
    """The run folder; of an array, a folder with a link `0`, `1` ... per task to its run folder."""
    tasks: int = 0
    """How many tasks an array has; 0 means that it is a job by itself."""

    def log(self, stage: str) -> str:
        """Slurm's pattern for the log of a stage, in the run folder. Its ending keeps it out of the record."""
        return f"{self.run}/%a/{stage}-%A.log" if self.tasks else f"{self.run}/{stage}-%j.log"


def train_script(place: Place, launch: Launch) -> str:
    """The batch script of the training: every rank of every node, warned before the end and queued again."""
    lines = [
        f"--nodes={launch.nodes}",
        f"--ntasks-per-node={launch.devices}",
        *([f"--gpus-per-node={launch.devices}"] if launch.gpus else []),
        f"--signal=B:USR1@{launch.warn_seconds}",
    ]
    return _script(place, launch, "train", lines)


def later_script(place: Place, launch: Launch) -> str:
    """The batch script of one later stage, which it is given as a word: one task, with one GPU where there are any."""
    return _script(place, launch, "later", ["--nodes=1", "--ntasks=1", *(["--gpus-per-node=1"] if launch.gpus else [])])


def table_script(place: Place, launch: Launch) -> str:
    """The batch script that writes what the runs below `place.run` have found: one task without a GPU."""
    return _script(place, launch, "table", ["--nodes=1", "--ntasks=1"])


def _script(place: Place, launch: Launch, stage: str, lines: list[str]) -> str:
    head = [
        f"--job-name={place.name}",
        *lines,
        *_asked(launch),
        *launch.sbatch,
        "--requeue",
        "--open-mode=append",
        f"--output={place.log(stage)}",
        *([f"--array=0-{place.tasks - 1}"] if place.tasks else []),
    ]
    folder = shlex.quote(str(place.run))
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in head),
            "",
            f"RUN={folder}" if not place.tasks else f'RUN=$(readlink -f {folder}/"$SLURM_ARRAY_TASK_ID")',
            f"PYTHON={shlex.quote(place.python)}",
            *(f"{line} || {{ echo {shlex.quote('launch.setup failed: ' + line)}; exit 3; }}" for line in launch.setup),
            "",
            (HERE / f"{stage}.sh").read_text(encoding="utf-8"),
        ]
    )


def _asked(launch: Launch) -> list[str]:
    """Options for what the recipe asks a site for; what it leaves open is left to the site."""
    given = {
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "time": launch.time,
        "cpus-per-task": launch.cpus_per_task,
        "mem": launch.memory,
    }
    return [f"--{name}={value}" for name, value in given.items() if value]
