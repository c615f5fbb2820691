"""Some real training steps on this machine, for a plan that rests on them: `probe(recipe, steps)`.

A child process trains in a run folder that is thrown away, so that this one never imports torch. Rows are prepared as
the real run prepares them, and lie in the cache for it afterwards.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import date
from typing import Any

from finetune.compare import Row, compare
from finetune.cost import Probe
from finetune.errors import RecipeError, RunError
from finetune.launch import end, handed_on
from finetune.plan import Plan, plan
from finetune.recipe import Recipe
from finetune.run import start
from finetune.rundir import RunDir, read_json

STDERR = 2
"""Where the child writes: what this process prints may be JSON."""
WARM_UP = 1
"""Updates before those that are timed."""


@dataclass(frozen=True, slots=True)
class Probed:
    """A plan that rests on measured steps."""

    plan: Plan
    """The plan: rows and tokens counted, hours from measured seconds."""
    rows: tuple[Row, ...]
    """What was planned for the steps, and measured."""


def probe(recipe: Recipe, steps: int) -> Probed:
    """The plan of a recipe after that many timed training steps here.

    Raises RecipeError (PLN-001) where the recipe does not train here, what `start` raises, and RunError (PLN-002) when
    the child fails; it has said why.
    """
    if recipe.launch.kind != "local" or recipe.launch.nodes > 1:
        why = "probe trains on this machine, and launch.kind=slurm does not"
        raise RecipeError([f"PLN-001 probe={steps}: {why}. Set launch=local, with launch.devices as here."])
    with trained(shortened(recipe, steps)) as run_dir:
        train = read_json(run_dir.train)
        planned = plan(recipe, prepared=run_dir.data)
        measured = measurement(train, flops_per_step(planned))
        rows = compare(plan(shortened(recipe, steps), prepared=run_dir.data).as_json(), train)
        return Probed(plan(recipe, prepared=run_dir.data, probe=measured), tuple(r for r in rows if r.unit == "GiB"))


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with so many updates and one before them; nothing is evaluated, tracked or saved on the way."""
    short = deepcopy(recipe)
    short.train.max_steps = steps + WARM_UP
    short.train.save_steps = steps + WARM_UP
    short.train.evaluate_steps, short.train.adapter_of, short.train.report_to = 0, "last", []
    return short


def measurement(train: dict[str, Any], flops: float) -> Probe:
    """What the timed steps of a train.json took; `flops` are those of one."""
    timed = train["steps"][WARM_UP:]
    seconds = statistics.median(step["seconds"] for step in timed)
    tokens = statistics.mean(step["tokens"] for step in timed)
    return Probe(
        steps=len(timed),
        seconds_per_step=seconds,
        tokens_per_second=tokens / seconds,
        tflops=flops / seconds / 1e12,
        peak_gib=train["peak_memory_gib"],
        device=str(train["device"]),
        when=date.today().isoformat(),
    )


def flops_per_step(figures: Plan) -> float:
    """Operations of one update, by the plan."""
    return sum(f.value for f in figures.work if f.unit == "FLOP") / figures.figure("steps").value


@contextmanager
def trained(recipe: Recipe) -> Iterator[RunDir]:
    """A run of the recipe up to its adapter, in a folder that is removed at the end of the block.

    A signal to this process asks the child to stop. Raises RunError (PLN-002) when the child did not finish.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-probe-") as folder:
        recipe.runs_dir = folder
        run_dir = start(recipe)
        words = [sys.executable, "-m", "finetune", "train", f"run={run_dir.path}"]
        running: list[subprocess.Popen[bytes]] = []
        with handed_on(running):
            try:
                running.append(subprocess.Popen(words, stdout=STDERR, start_new_session=True))
                code = running[0].wait()
            finally:
                end(running)
        if code or not run_dir.train.exists():
            what = f"the {recipe.train.max_steps} training steps ended with exit code {code}"
            raise RunError("PLN-002", what, "it says why above", "the plan without probe=, or a smaller job")
        yield run_dir
