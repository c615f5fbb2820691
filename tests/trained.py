"""Trainings that a test starts, kills and starts again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from finetune.compose import load_recipe
from finetune.machine import deepspeed_absent
from finetune.run import carry_on, start
from finetune.rundir import RunDir, read_json

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


def begun(run_dir: RunDir, module: str = "finetune", processes: int = 1, more: Sequence[str] = ()) -> subprocess.Popen:
    """The training of a run in a process of its own; `module` other than finetune is started as a launcher would."""
    words = ["train", f"run={run_dir.path}", *more]
    code = [sys.executable, "-m", module, *words]
    if module != "finetune":
        command = [sys.executable, "-m", module, "train", str(run_dir.path)]
        code = [sys.executable, "-c", f"from finetune.launch import together; together({command!r}, {processes})"]
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path.rstrip(":")}
    return subprocess.Popen(
        code, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """(exit code, everything it printed)."""
    words, _ = process.communicate(timeout=300)
    return process.returncode, words


def kill_after(process: subprocess.Popen, run_dir: RunDir, step: int, more_seconds: float = 0.0) -> None:
    """Kills the process group with -9 some time after the checkpoint of `step` or a later one is there."""
    wait_for(process, run_dir, step)
    time.sleep(more_seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_for(process: subprocess.Popen, run_dir: RunDir, step: int) -> None:
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
