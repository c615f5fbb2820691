"""The whole job: order, continuing, refusing, and what is left behind when a stage fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune import worker
from finetune.compose import read_recipe
from finetune.errors import GateError, RecipeError, RunError, WeightsError
from finetune.launch import launch
from finetune.run import STAGES, carry_on, run, start
from finetune.rundir import TEMPORARY, create
from finetune.verify import differences
from tests.job import Stages, good, ready


def test_the_stages_run_in_order_and_leave_a_finished_run(tmp_path: Path) -> None:
    stages = Stages()
    run_dir = run(ready(tmp_path), launch=stages)
    assert stages.done == ["data", "train", "evaluate", "merge", "export", "report"]
    assert run_dir.path == tmp_path / "runs" / "job" / "0001"
    for path in (run_dir.recipe, run_dir.plan, run_dir.scores, run_dir.report, run_dir.record):
        assert path.is_file()


def test_the_recipe_is_frozen_and_the_plan_written_before_the_first_stage(tmp_path: Path) -> None:
    recipe = ready(tmp_path, adapter__rank=3)
    with pytest.raises(RuntimeError):
        run(recipe, launch=Stages("data", RuntimeError("broken")))
    folder = tmp_path / "runs" / "job" / "0001"
    assert read_recipe(folder / "recipe.yaml") == recipe
    assert json.loads((folder / "plan.json").read_text())["recipe"] == "job"


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_run_continues_at_the_stage_that_failed(tmp_path: Path, stage: str) -> None:
    recipe = ready(tmp_path)
    first, second = Stages(stage, RuntimeError("broken")), Stages()
    with pytest.raises(RuntimeError):
        run(recipe, launch=first)
    run_dir = run(recipe, run_dir=create_again(tmp_path), launch=second)
    assert first.done + second.done == list(STAGES)
    assert second.done[0] == stage
    assert run_dir.record.is_file()


def create_again(tmp_path: Path):  # type: ignore[no-untyped-def]
    from finetune.rundir import open_run

    return open_run(tmp_path / "runs" / "job" / "0001")


def test_every_job_gets_its_own_folder(tmp_path: Path) -> None:
    recipe = ready(tmp_path)
    assert run(recipe, launch=Stages()).path.name == "0001"
    assert run(recipe, launch=Stages()).path.name == "0002"


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    recipe = ready(tmp_path)
    run_dir = run(recipe, launch=Stages())
    written = run_dir.record.read_text()
    again = Stages()
    run(recipe, run_dir=run_dir, launch=again)
    assert again.done == [] and run_dir.record.read_text() == written


def test_a_stage_that_is_repeated_makes_a_new_record(tmp_path: Path) -> None:
    recipe = ready(tmp_path)
    run_dir = run(recipe, launch=Stages())
    run_dir.report.unlink()
    (run_dir.export / "model.safetensors").rename(run_dir.export / "other.safetensors")
    run(recipe, run_dir=run_dir, launch=Stages())
    assert differences(run_dir) == []


def test_a_run_is_not_continued_with_other_settings(tmp_path: Path) -> None:
    run_dir = run(ready(tmp_path), launch=Stages())
    with pytest.raises(RunError, match="RUN-006"):
        run(ready(tmp_path, seed=18), run_dir=run_dir, launch=Stages())


def test_a_job_can_end_after_a_stage(tmp_path: Path) -> None:
    stages = Stages()
    run_dir = run(ready(tmp_path), until="train", launch=stages)
    assert stages.done == ["data", "train"] and not run_dir.record.exists()
    carry_on(run_dir, launch=stages)
    assert stages.done == list(STAGES) and run_dir.record.is_file()


def test_a_failed_gate_stops_the_job_also_when_it_is_continued(tmp_path: Path) -> None:
    recipe, stages = ready(tmp_path), Stages(passed=False)
    with pytest.raises(GateError, match=r"gain is 0\.0, demanded 0\.1"):
        run(recipe, launch=stages)
    with pytest.raises(GateError):
        run(recipe, run_dir=create_again(tmp_path), launch=stages)
    assert stages.done == ["data", "train", "evaluate"]


def test_a_recipe_with_problems_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        run(ready(tmp_path, adapter__rank=0, train__lr=0.0), launch=Stages())
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda base: (base / "config.json").write_text('{"model_type": "gpt2"}'), r"FAM-001 .*'gpt2'"),
        (
            lambda base: (base / "config.json").write_text('{"model_type": "qwen3_moe"}'),
            "WGT-008 .*mixtral",
        ),
        (lambda base: (base / "config.json").write_text("["), "WGT-002"),
        (lambda base: (base / "config.json").write_text("[]"), "WGT-002"),
        (lambda base: (base / "model.safetensors").write_bytes(b"weights"), "WGT-003 .*cut short or damaged"),
        (
            lambda base: (base / "config.json").write_text(
                '{"model_type": "mixtral", "quantization_config": {"quant_method": "awq"}}'
            ),
            "WGT-007 .*'awq'",
        ),
    ],
)
def test_a_base_that_could_not_be_loaded_is_refused_before_anything_is_written(tmp_path: Path, damage, says) -> None:  # type: ignore[no-untyped-def]
    recipe = ready(tmp_path)
    damage(tmp_path / "base")
    with pytest.raises(WeightsError, match=says):
        run(recipe, launch=Stages())
    assert not (tmp_path / "runs").exists()


def test_missing_weights_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="WGT-002"):
        run(good(runs_dir=str(tmp_path / "runs"), cache_dir=str(tmp_path)), launch=Stages())
    assert not (tmp_path / "runs").exists()


def test_a_folder_for_runs_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="RUN-001"):
        run(ready(tmp_path, runs_dir=str(tmp_path / "file" / "runs")), launch=Stages())


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(RunError, match="DSK-001"):
        run(ready(tmp_path), launch=Stages())
    assert not (tmp_path / "runs").exists()


def test_the_stages_of_the_job_are_those_a_worker_knows() -> None:
    assert list(STAGES) == list(worker.STAGES)
    with pytest.raises(RunError, match="RUN-008"):
        worker.stage_function("bake")


@pytest.fixture
def module_of_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the data stage one that says whether the run is locked and what the folder holds."""
    (tmp_path / "probe_stage.py").write_text(
        "import os\nfrom pathlib import Path\nfrom finetune.errors import RunError\n"
        "def probe(run_dir):\n"
        "    try:\n"
        "        with run_dir.lock(): held = False\n"
        "    except RunError: held = True\n"
        "    names = sorted(p.name for p in run_dir.path.iterdir())\n"
        "    (run_dir.path / 'probe').write_text(f\"{held} {names} {os.environ['OMP_NUM_THREADS']}\")\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(worker.STAGES, "data", "probe_stage:probe")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")


@pytest.mark.usefixtures("module_of_stages")
def test_a_stage_runs_with_the_lock_after_leftovers_are_swept_with_its_threads(tmp_path: Path) -> None:
    run_dir = start(ready(tmp_path, launch__cpu_threads=1))
    (run_dir.path / f"{TEMPORARY}adapter-1").mkdir()
    launch("data", run_dir)
    assert (run_dir.path / "probe").read_text() == "True ['.lock', 'plan.json', 'recipe.yaml'] 1"


@pytest.mark.usefixtures("module_of_stages")
def test_a_worker_process_carries_out_one_stage_and_explains_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = start(ready(tmp_path))
    assert worker.main(["data", str(run_dir.path)]) == 0
    assert (run_dir.path / "probe").is_file()
    with run_dir.lock():
        assert worker.main(["data", str(run_dir.path)]) == 3
    assert "RUN-003" in capsys.readouterr().err
    assert worker.main(["data"]) == 3
    assert worker.main(["data", str(tmp_path)]) == 3
    assert capsys.readouterr().err.count("RUN-00") == 2


def test_two_jobs_at_once_take_different_folders(tmp_path: Path) -> None:
    assert create(tmp_path, "job").path != create(tmp_path, "job").path
