"""Where a stage runs. Today: in this process. Other processes, devices and nodes will be started from here."""

from __future__ import annotations

import ctypes
import gc
import sys

from finetune.compose import read_recipe
from finetune.rundir import RunDir
from finetune.worker import work


def launch(stage: str, run_dir: RunDir) -> None:
    """Carries out one stage as `launch` of the recipe says. Raises what the stage raises, RunError if it is busy."""
    try:
        work(stage, run_dir, read_recipe(run_dir.recipe).launch.cpu_threads)
    finally:
        give_memory_back()


def give_memory_back() -> None:
    """Returns what the stage held to the system, so that the next one does not come on top of it."""
    gc.collect()  # a trainer and its model refer to each other
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc keeps freed memory otherwise
        libc.malloc_trim(0)
