"""What may stand in a batch script: `problems(recipe)`. Settings go into its lines: none may begin one of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from finetune.recipe import Launch, Recipe

PATTERNS = {
    "partition": (re.compile(r"[\w.-]+(,[\w.-]+)*"), "main or main,long"),
    "account": (re.compile(r"[\w.@-]+"), "my_project"),
    "qos": (re.compile(r"[\w.@-]+"), "normal"),
    "constraint": (re.compile(r"[\w.,&|*!()\[\]:=-]+"), "a100&ib"),
    "time": (re.compile(r"(\d+-)?\d+(:\d\d){0,2}"), "04:00:00 or 2-00:00:00"),
    "memory": (re.compile(r"\d+[KMGT]?"), "200G"),
}
"""Setting of `launch` -> what it may look like, and an example."""
OPTION = re.compile(r"--([a-z][a-z0-9-]*)(=[\w.,:/@%+*&|()\[\]~-]+)?")
"""One option of sbatch in its long form, with nothing that a shell or a second option could come of."""
OURS = {
    *("array", "begin", "chdir", "clusters", "dependency", "error", "export", "export-file", "help", "hold", "input"),
    *("job-name", "kill-on-invalid-dep", "no-requeue", "ntasks", "ntasks-per-node", "open-mode", "output", "parsable"),
    *("quiet", "requeue", "signal", "test-only", "usage", "verbose", "version", "wait", "wrap"),
}
"""Options of sbatch that make the jobs what they are; `launch.sbatch` may not name them."""
WITH_A_SETTING = {
    "nodes": "nodes",
    "gpus-per-node": "devices",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "time": "time",
    "cpus-per-task": "cpus_per_task",
    "mem": "memory",
}
"""Option of sbatch -> the setting of `launch` that gives it."""
SETUP_WORDS = ("module", "ml", "source", ".", "export", "unset", "ulimit", "spack", "conda", "mamba", "micromamba")
"""What a line of `launch.setup` may begin with."""
SETUP = re.compile(r"[\w.-]+( +[\w./:=@%+,~${}-]+)*")
"""Plain words and variables: no second command, no substitution, no redirection."""
SHARED_PATH = re.compile(r"[\w./+@,=~-]+")
"""A path that a batch script can hold as it is; Slurm reads % in a file's name as a pattern."""
ONLY_SLURM = ("gpus", *PATTERNS, "warn_seconds", "cpus_per_task", "sbatch", "setup")
"""Settings of `launch` that have no effect here."""


def problems(recipe: Recipe) -> Iterator[str]:
    """A sentence for everything about `launch` that Slurm could not take, or that would do more than it says."""
    if recipe.launch.kind != "slurm":
        yield from _without_effect(recipe.launch)
        return
    if not Path(recipe.runs_dir).expanduser().is_absolute() or not SHARED_PATH.fullmatch(recipe.runs_dir):
        yield (
            f"SLM-011 runs_dir={recipe.runs_dir!r} must be an absolute path of letters, digits and . _ - / + @ , = "
            "with launch.kind=slurm: jobs write there from other machines. Set runs_dir=/a/shared/folder."
        )
    if recipe.launch.distribution == "fsdp2" and not recipe.launch.gpus:
        yield (
            "SLM-017 launch.distribution=fsdp2 with launch.gpus=false: on CPUs Accelerate would hold the whole base in "
            "every process. Set launch.distribution=ddp."
        )
    yield from _patterns(recipe.launch)
    yield from _options(recipe.launch)
    yield from _setup(recipe.launch)


def seconds(time: str) -> int:
    """The seconds in a time limit as Slurm reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, more = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, more = parts
    else:
        hours, (minutes, more) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + more


def _without_effect(launch: Launch) -> Iterator[str]:
    for name in ONLY_SLURM:
        if getattr(launch, name) != getattr(Launch(), name):
            yield f"SLM-015 launch.{name} has no effect with launch.kind=local. Add launch=slurm, or leave it out."


def _patterns(launch: Launch) -> Iterator[str]:
    for name, (pattern, example) in PATTERNS.items():
        value = getattr(launch, name)
        if value and not pattern.fullmatch(value):
            yield f"SLM-012 launch.{name}={value!r} is not of the form that Slurm takes. Write it as {example}."
        elif name == "time" and value and seconds(value) <= launch.warn_seconds:
            yield (
                f"SLM-016 launch.time={value} is {seconds(value)} s, the warning comes launch.warn_seconds="
                f"{launch.warn_seconds} before its end: nothing would be trained. Set a longer launch.time."
            )


def _options(launch: Launch) -> Iterator[str]:
    for option in launch.sbatch:
        found = OPTION.fullmatch(option)
        if not found:
            yield (
                f"SLM-013 launch.sbatch: {option!r} is no single long option with a plain value. "
                "Write it as --mail-type=END."
            )
        elif found[1] in WITH_A_SETTING:
            yield f"SLM-013 launch.sbatch: --{found[1]} has a setting. Use launch.{WITH_A_SETTING[found[1]]}."
        elif found[1] in OURS:
            yield f"SLM-013 launch.sbatch: --{found[1]} is set by the program, which relies on it. Leave it out."


def _setup(launch: Launch) -> Iterator[str]:
    for line in launch.setup:
        if not SETUP.fullmatch(line) or line.split()[0] not in SETUP_WORDS:
            yield (
                f"SLM-014 launch.setup: {line!r} is more than one plain command that begins with one of "
                f"{', '.join(SETUP_WORDS)}. Put it into a file and write: source /that/file"
            )
