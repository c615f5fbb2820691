"""What another process executes: `python -m finetune.worker STAGE RUN` carries out one stage of an existing run.

A training of several processes is this command once per device, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT in the environment. It ends with 0 when the stage is done, and also when training stopped early on request:
then the run folder has a file REQUEUE.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext

from finetune import collecting
from finetune.errors import Preempted, RunError
from finetune.ranks import expected
from finetune.rundir import RunDir, open_run
from finetune.stop import end_with_parent, listen

STAGES = {
    "data": "finetune.data:prepare",
    "train": "finetune.train:train",
    "evaluate": "finetune.evaluate:evaluate",
    "merge": "finetune.merge:merge",
    "export": "finetune.export:export",
    "report": "finetune.report:report",
}
"""Stage -> function that reads a run folder and writes into it. Import strings: nothing is imported before its turn."""


def work(stage: str, run_dir: RunDir, cpu_threads: int = 0) -> None:
    """Carries out one stage with the run's lock held; leftovers of a killed process are removed first.

    Of several processes the first holds the lock. Raises RunError when another process holds the run, and what the
    stage raises.
    """
    function = stage_function(stage)
    _set_threads(cpu_threads)
    first = expected()[0] == 0
    with run_dir.lock() if first else nullcontext():
        if first:
            run_dir.sweep()
        function(run_dir)


def stage_function(stage: str) -> Callable[[RunDir], None]:
    """The function of a stage. Raises RunError for a name that is no stage."""
    if stage not in STAGES:
        raise RunError("RUN-008", f"there is no stage {stage}", f"the stages are {', '.join(STAGES)}", "one of them")
    module, _, name = STAGES[stage].partition(":")
    function: Callable[[RunDir], None] = getattr(importlib.import_module(module), name)
    return function


def _set_threads(count: int) -> None:
    """Threads of CPU arithmetic; 0 leaves them as they are. Before torch is imported the environment decides."""
    if count > 0:
        os.environ["OMP_NUM_THREADS"] = str(count)
        if "torch" in sys.modules:
            import torch

            torch.set_num_threads(count)


def main(words: list[str]) -> int:
    """The exit code of `python -m finetune.worker STAGE RUN`."""
    from finetune.compose import read_recipe
    from finetune.failures import explain

    run_dir = None
    if words[:1] == ["train"]:
        listen()  # a warning that comes while the base is loading counts too
    _end_with_parent()
    try:
        if len(words) != 2:
            raise RunError(
                "RUN-008",
                "two words are needed",
                "a stage and a run folder",
                "python -m finetune.worker train runs/NAME/0001",
            )
        run_dir = open_run(words[1])
        work(words[0], run_dir, read_recipe(run_dir.recipe).launch.cpu_threads)
    except Preempted as stopped:
        if expected()[0] == 0 and "FINETUNE_PARENT" not in os.environ:  # who started this one says it
            print(stopped.sentence(), file=sys.stderr, flush=True)
    except BaseException as error:
        return explain(error, run_dir)
    finally:
        _leave()
    return 0


def _end_with_parent() -> None:
    """A process of a training ends when the one that started it does, however that ends."""
    started_here = "FINETUNE_PARENT" in os.environ and os.environ["FINETUNE_PARENT"] == str(os.getppid())
    if started_here or expected()[1] > 1:
        end_with_parent()


def _leave() -> None:
    """Ends this process' part in a group, if it is in one."""
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    collecting.seldom()
    sys.exit(main(sys.argv[1:]))
