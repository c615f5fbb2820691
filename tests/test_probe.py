"""`plan probe=N`: real steps in a child process, and a plan that rests on them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune import probe as probing
from finetune.__main__ import main
from finetune.errors import RecipeError
from finetune.plan import plan
from finetune.recipe import Recipe
from finetune.rundir import RunDir, write_json
from tests.job import good

ROOT = Path(__file__).resolve().parents[1]
STEPS = [{"seconds": s, "tokens": t} for s, t in ((50.0, 900), (4.0, 100), (2.0, 120), (3.0, 80))]


def told(**changes: Any) -> dict[str, Any]:
    """A train.json of four steps, the first of which warms up."""
    train = {
        "steps": STEPS,
        "coverage": [{"trainable": 10}],
        "resident_gib": 0.25,
        "peak_memory_gib": 1.5,
        "device": "a machine",
        "tokens": 300,
        "seconds": 59.0,
    }
    return train | changes


def test_steps_are_timed_after_one_that_warms_up() -> None:
    measured = probing.measurement(told(), flops=6e12)
    assert (measured.steps, measured.seconds_per_step, measured.peak_gib) == (3, 3.0, 1.5)
    assert measured.tokens_per_second == 100 / 3.0
    assert measured.tflops == pytest.approx(2.0)


def test_a_shortened_job_has_one_more_step_and_nothing_beside_them() -> None:
    recipe = good(train__evaluate_steps=5, train__adapter_of="best")
    short = probing.shortened(recipe, 3)
    assert (short.train.max_steps, short.train.evaluate_steps, short.train.report_to) == (4, 0, [])
    assert recipe.train.max_steps == 0 and recipe.train.evaluate_steps == 5, "the recipe itself has changed"
    assert short.train.batch_size == recipe.train.batch_size and short.data == recipe.data


def test_hours_are_the_steps_of_the_whole_job_times_the_measured_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def trained(recipe: Recipe) -> Iterator[RunDir]:
        assert recipe.train.max_steps == 4
        run_dir = RunDir(tmp_path)
        write_json(run_dir.train, told())
        splits = {"train": {"rows": 400, "tokens": 4000}, "heldout": {"rows": 7}}
        write_json(run_dir.data / "report.json", {"splits": splits})
        yield run_dir

    monkeypatch.setattr(probing, "trained", trained)
    found = probing.probe(good(), 3)
    assert found.plan.figure("steps").value == 100 and found.plan.figure("tokens per row").value == 10
    assert found.plan.figure("hours").value == 100 * 3.0 / 3600
    assert found.plan.figure("hours").basis == "measured"
    flops = sum(f.value for f in found.plan.work if f.unit == "FLOP")
    assert found.plan.figure("speed reached").value == pytest.approx(flops / 100 / 3.0 / 1e12)
    assert {row.name for row in found.rows} == {"weights at rest", "what is trained", "peak while training"}


def test_a_job_on_a_cluster_is_not_probed_here() -> None:
    with pytest.raises(RecipeError, match="PLN-001 probe=3"):
        probing.probe(good(launch__kind="slurm"), 3)


@pytest.mark.parametrize("word", ["probe=0", "probe=three", "probe=-1", "probe=5000"])
def test_what_is_no_number_of_steps_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe=qwen3_30b_legal", word]) == 2
    assert f"PLN-003 {word}" in capsys.readouterr().err


def test_a_base_that_is_not_here_is_named_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe=qwen3_30b_legal", "probe=3"]) == 3
    assert "WGT-003" in capsys.readouterr().err


def test_a_child_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(probing, "start", lambda recipe: RunDir(tmp_path / "no run"))
    assert main(["plan", "recipe=legal_quickstart", "scale=rehearsal", "probe=1"]) == 3
    words = capfd.readouterr().err
    assert "RUN-004" in words and "PLN-002 the 2 training steps ended with exit code 3" in words


@pytest.mark.slow
def test_real_steps_of_a_rehearsal_are_timed_without_torch_in_this_process(tmp_path: Path) -> None:
    code = (
        "import sys; from finetune.__main__ import main; code = main(sys.argv[1:])\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else code)"
    )
    places = (f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}")
    words = ("plan", "recipe=legal_quickstart", "scale=rehearsal", "probe=2", "--json", *places)
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    cost = {figure["name"]: figure for figure in printed["cost"]}
    steps = next(f["value"] for f in printed["work"] if f["name"] == "steps")
    assert cost["hours"]["value"] == pytest.approx(steps * cost["seconds per update"]["value"] / 3600)
    assert "measured here on cpu" in cost["hours"]["how"]
    rows = {row["name"]: row for row in printed["probe"]}
    for name in ("weights at rest", "what is trained", "optimizer"):
        assert abs(rows[name]["error"]) < 0.05, rows[name]
    assert "step 3/3" in done.stderr and not (tmp_path / "runs").exists()


def test_a_plan_without_a_probe_says_that_hours_are_assumed() -> None:
    assert plan(good()).figure("hours").basis == "assumed"
