"""Where a stage runs. Today: in this process. Other processes, devices and nodes will be started from here."""

from __future__ import annotations

from finetune.compose import read_recipe
from finetune.rundir import RunDir
from finetune.worker import work


def launch(stage: str, run_dir: RunDir) -> None:
    """Carries out one stage as `launch` of the recipe says. Raises what the stage raises, RunError if it is busy."""
    work(stage, run_dir, read_recipe(run_dir.recipe).launch.cpu_threads)
