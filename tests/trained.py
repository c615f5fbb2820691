"""Trainings that a test starts, kills and starts again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from finetune.compose import load_recipe
from finetune.errors import FinetuneError
from finetune.failures import explain
from finetune.launch import stopped, together
from finetune.machine import deepspeed_absent
from finetune.run import carry_on, start
from finetune.rundir import RunDir, read_json
from tests.warm import Forked

ROOT = Path(__file__).resolve().parent.parent
ADAPTER = "adapter_model.safetensors"

with_deepspeed = (
    pytest.mark.deepspeed,
    pytest.mark.skipif(bool(deepspeed_absent()), reason=f"the extra [deepspeed]: {deepspeed_absent()}"),
)
"""Marks of a test that trains with DeepSpeed: a tier of its own, for an environment that has it."""


def prepared(folder: Path, *words: str, recipe: str = "legal_quickstart") -> RunDir:
    """A rehearsal of a recipe whose data stage is done, in a run folder below `folder`."""
    places = (f"runs_dir={folder / 'runs'}", f"cache_dir={folder / 'cache'}")
    run_dir = start(load_recipe(recipe, "scale=rehearsal", *places, *words))
    return carry_on(run_dir, until="data")


def begun(
    run_dir: RunDir,
    module: str = "finetune",
    processes: int = 1,
    more: Sequence[str] = (),
    *,
    typed: bool = False,
) -> Any:
    """The training of a run in a process of its own; `module` other than finetune is started as a launcher would.

    It is a fork (`tests/warm.py`); with `typed` the command itself, as a user types it.
    """
    words = ["train", f"run={run_dir.path}", *more]
    if module != "finetune":
        words, module = [module, str(processes), "train", str(run_dir.path)], "tests.trained"
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path.rstrip(":")}
    if not typed:
        return Forked(module, words, environment)
    code = [sys.executable, "-m", module, *words]
    return subprocess.Popen(
        code, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def main(words: Sequence[str]) -> int:
    """`python -m tests.trained MODULE PROCESSES WORDS`: the launcher of a module; the last word is a run folder."""
    module, processes, *rest = words
    run_dir = RunDir(Path(rest[-1]))
    run_dir.requeue.unlink(missing_ok=True)
    try:
        together([sys.executable, "-m", module, *rest], int(processes))
        if run_dir.requeue.exists():
            raise stopped(run_dir)
    except FinetuneError as error:
        return explain(error, run_dir)
    return 0


def ended(process: Any) -> tuple[int, str]:
    """(exit code, everything it printed)."""
    words, _ = process.communicate(timeout=300)
    return process.returncode, words


def kill_after(process: Any, run_dir: RunDir, step: int, more_seconds: float = 0.0) -> None:
    """Kills the process group with -9 some time after the checkpoint of `step` or a later one is there."""
    wait_for(process, run_dir, step)
    time.sleep(more_seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for(process: Any, run_dir: RunDir, step: int) -> None:
    """Waits until the checkpoint of `step` or a later one is there."""
    until = time.monotonic() + 240
    while not any(int(p.name[5:]) >= step for p in run_dir.checkpoints.glob("step-*")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.01)


def told(run_dir: RunDir) -> list[tuple]:
    """What must be bit-identical: loss, gradient norm, learning rate and batch digest of every step."""
    steps = read_json(run_dir.train)["steps"]
    return [(s["step"], s["loss"], s["grad_norm"], s["lr"], s["batch"]) for s in steps]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
