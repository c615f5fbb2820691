"""The command of `scripts/slurm/train.sbatch`: writes a run's batch script into its folder and prints where it is."""

from __future__ import annotations

import sys

from finetune.errors import RunError
from finetune.failures import explain
from finetune.rundir import open_run
from finetune.slurm import script_of


def main(words: list[str]) -> int:
    """The exit code of `python -m finetune.slurm RUN`."""
    try:
        if len(words) != 1:
            raise RunError("SLM-008", "one word is needed", "a run folder", "python -m finetune.slurm runs/NAME/0001")
        print(script_of(open_run(words[0])))
    except BaseException as error:
        return explain(error, None)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
