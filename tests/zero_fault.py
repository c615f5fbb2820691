"""`python -m tests.zero_fault train RUN`: a process of a training in which $ZERO_FAULT spoils some gradients.

`silent` makes those of the query maps zero in every process; `infinite` makes them so in the last process, from the
third update on.
"""

from __future__ import annotations

import os
import sys
from tempfile import TemporaryDirectory

from finetune.failures import explain
from finetune.ranks import expected
from finetune.rundir import open_run


def main(run: str) -> int:
    from rich.console import Console

    from finetune.compose import read_recipe
    from finetune.stop import Request
    from finetune.train.distribute import join
    from finetune.train.stage import _run, prepare

    run_dir = open_run(run)
    recipe, fault, (rank, world) = read_recipe(run_dir.recipe), os.environ["ZERO_FAULT"], expected()
    try:
        with TemporaryDirectory() as scratch:
            job = prepare(recipe, run_dir, join(recipe), scratch, Console(quiet=True), Request())

            def spoiled(gradient):
                if fault == "silent":
                    return gradient * 0
                late = job.trainer.state.global_step >= 2 and rank == world - 1
                return gradient * float("inf") if late else gradient

            for name, parameter in job.trainer.model.named_parameters():
                if ".q_proj.lora_B." in name:
                    parameter.register_hook(spoiled)
            _run(job)
    except BaseException as error:
        return explain(error, run_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[2]))
