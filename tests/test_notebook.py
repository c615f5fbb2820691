"""The Python API: what `from finetune import ...` gives, runs and sweeps as values, errors as sentences."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune import check
from finetune.errors import RecipeError, RunError
from finetune.evaluate.rows import write_lines
from finetune.notebook import OpenedRun, compare, open_run, open_sweep, run_sweep
from finetune.plan import plan, read_plan
from finetune.run import run
from finetune.rundir import RunDir, read_json, write_json, write_text
from tests.finished_run import results
from tests.job import Stages, good, ready
from tests.test_views import SCORES

ROOT = Path(__file__).resolve().parent.parent
TRAIN = {
    "steps": [{"step": 1, "loss": 2.0, "lr": 0.1}, {"step": 2, "loss": 1.0, "lr": 0.0}],
    "seconds": 7.5,
    "peak_memory_gib": 0.5,
    "coverage": [
        {
            "group": "routed",
            "parameters": 1000,
            "bytes": 562.5,
            "parameters_4bit": 1000,
            "adapted": 1000,
            "trainable": 9,
        },
        {"group": "router", "parameters": 100, "bytes": 200, "parameters_4bit": 0, "adapted": 0, "trainable": 0},
    ],
}
SAMPLES = [{"row": "a-1", "question": "Q?", "base": "no", "tuned": "yes", "expected": "yes"}]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Real(Stages):
    """Stages that leave a training and scores as real ones do."""

    def __call__(self, stage: str, run_dir: RunDir) -> None:
        super().__call__(stage, run_dir)
        if stage == "train":
            write_json(run_dir.train, read_json(run_dir.train) | TRAIN)
            run_dir.loss_plot.write_bytes(b"\x89PNG")
        if stage == "evaluate":
            write_json(run_dir.scores, SCORES | {"samples": SAMPLES})
        if stage == "data":
            lines = (
                '{"split": "train", "code": ""}',
                '{"split": "", "code": "copy"}',
                '{"split": "train", "code": ""}',
            )
            write_text(run_dir.data / "ledger.jsonl", "\n".join(lines) + "\n")


@pytest.fixture
def job(tmp_path: Path) -> OpenedRun:
    return open_run(run(ready(tmp_path), launch=Real()))


# --- what is imported


def test_plan_and_run_can_be_called_whichever_of_module_and_function_python_gives() -> None:
    code = """
{first}
from finetune import load_recipe, open_run, plan, run
import inspect, finetune.plan, finetune.run
recipe = load_recipe("legal_quickstart")
print(plan(recipe) == finetune.plan(recipe) == finetune.plan.plan(recipe), list(inspect.signature(run).parameters)[0])
"""
    for first in ("", "import finetune.run", "from finetune.plan import plan", "import finetune; finetune.run"):
        assert python(code.format(first=first)) == "True recipe"


def test_everything_the_package_offers_is_there_and_importing_it_imports_no_torch() -> None:
    code = """
import sys, finetune
early = sorted(name for name in sys.modules if name.startswith("finetune"))
given = [getattr(finetune, name) for name in finetune.__all__]
print(early, "torch" in sys.modules, all(callable(g) or isinstance(g, str) for g in given), len(given))
"""
    assert python(code) == f"['finetune'] False True {len(finetune.__all__)}"
    assert set(finetune.__all__) == {"__version__", *finetune.API}
    with pytest.raises(AttributeError, match="no attribute 'plann'"):
        finetune.plann  # noqa: B018


# --- a run


def test_an_opened_run_gives_what_its_stages_left(job: OpenedRun) -> None:
    assert job.done == ("data", "train", "evaluate", "merge", "export", "report")
    assert job.rows.as_rows() == [{"where": "train", "rows": 2}, {"where": "dropped: copy", "rows": 1}]
    assert job.losses.values == [2.0, 1.0] and job.losses.picture == job.files.loss_plot
    covered = job.coverage.as_rows()
    assert [(row["weights"], row["stored"], row["trained"]) for row in covered] == [
        ("routed experts", "4-bit", 9),
        ("router", "16-bit", 0),
    ]
    assert "Not in 4 bits: router." in job.coverage.note
    assert job.scores.values["tuned"] == SCORES["tuned"]
    assert job.samples.as_rows() == [{"question": "Q?", "base": "no", "tuned": "yes", "expected": "yes"}]
    assert {"file": "model.safetensors", "bytes": 6} in job.exported.as_rows()
    assert job.report == job.files.report and repr(job) == f"{job.path}: all stages are done"
    assert open_run(str(job.path)) == open_run(job) == job


def test_a_plan_reads_back_equal_and_shows_every_figure_with_its_source(job: OpenedRun) -> None:
    expected = plan(job.recipe)
    assert job.plan == expected
    figures = [figure for group in expected.groups().values() for figure in group]
    rows = expected.as_rows()
    assert [(row["name"], row["value"], row["how"]) for row in rows] == [(f.name, f.value, f.how) for f in figures]
    for shown in (repr(expected), expected._repr_html_()):
        assert expected.verdict in shown and all(figure.name in shown for figure in figures)


def test_a_plan_of_another_version_is_an_error_and_not_half_a_plan(tmp_path: Path) -> None:
    values = plan(good()).as_json()
    del values["ways"]
    write_json(tmp_path / "plan.json", values)
    with pytest.raises(RunError, match=r"RUN-010 .*another version has written it"):
        read_plan(tmp_path / "plan.json")


def test_a_stage_that_has_not_run_is_named_with_what_to_type(tmp_path: Path) -> None:
    begun = open_run(run(ready(tmp_path), until="data", launch=Real()))
    assert begun.done == ("data",)
    assert repr(begun) == f"{begun.path}: still to do: train, evaluate, merge, export, report"
    looks = {"losses": "train", "coverage": "train", "scores": "evaluate", "exported": "export", "report": "report"}
    for name, stage in looks.items():
        with pytest.raises(RunError, match=f"RUN-002 .*python -m finetune {stage} run="):
            getattr(begun, name)
    with pytest.raises(RunError, match="RUN-004"):
        open_run(tmp_path)


def test_a_run_goes_on_from_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Real()
    begun = open_run(run(ready(tmp_path), until="data", launch=stages))
    monkeypatch.setattr("finetune.launch.work", lambda stage, run_dir, threads: stages(stage, run_dir))
    assert begun.carry_on(until="train") == begun and begun.done == ("data", "train")
    assert stages.done == ["data", "train"]


def test_compared_runs_show_the_settings_that_differ_and_what_came_of_them(tmp_path: Path) -> None:
    first = run(ready(tmp_path), launch=Real())
    second = run(ready(tmp_path, adapter__rank=4), until="train", launch=Real())
    rows = {str(row[""]): row for row in compare(first, second.path).as_rows()}
    assert [key for key in rows if "." in key] == ["adapter.rank"]
    assert (rows["adapter.rank"]["job/0001"], rows["adapter.rank"]["job/0002"]) == ("16", "4")
    assert (rows["held-out loss, tuned"]["job/0001"], rows["held-out loss, tuned"]["job/0002"]) == (1.23456, None)
    assert rows["trained parameters"]["job/0002"] == 9


# --- a sweep


def test_a_sweep_gives_its_table_its_plot_its_runs_and_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {"0001": 1.5, "0002": 1.2}

    def carry_out(words: list[str]) -> int:
        place = RunDir(Path(words[1].removeprefix("run=")))
        if place.path.name not in losses:
            return 3
        sides = {"tuned": {"loss": losses[place.path.name], "accuracy": 0.5}, "base": {"loss": 2.5}}
        write_json(place.scores, sides | {"gates": []})
        return 0

    ready(tmp_path)
    places = [f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path}", f"model.source={tmp_path / 'base'}"]
    monkeypatch.setattr("finetune.sweep.process", carry_out)
    swept = run_sweep("legal_quickstart", "adapter.rank=2,4,8", *places)
    assert [(row["job"], row["tuned loss"], row["exit code"]) for row in swept.as_rows()] == [
        ("adapter.rank=4", 1.2, 0),
        ("adapter.rank=2", 1.5, 0),
        ("adapter.rank=8", None, 3),
    ]
    assert swept.best == swept.runs[1] and swept.best.recipe.adapter.rank == 4
    assert "data:image/png;base64," in swept._repr_html_() and "adapter.rank=8" in repr(swept)
    assert open_sweep(swept.path).as_rows() == swept.as_rows()
    losses["0003"] = 1.1
    assert swept.carry_on().best.path.name == "0003"


def test_a_sweep_without_scores_has_no_best_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready(tmp_path)
    places = [f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path}", f"model.source={tmp_path / 'base'}"]
    monkeypatch.setattr("finetune.sweep.process", lambda words: 3)
    swept = run_sweep("legal_quickstart", "adapter.rank=2,4", *places)
    with pytest.raises(RunError, match=r"SWP-004 no job of .* has scores"):
        swept.best  # noqa: B018


def test_compared_runs_are_tested_row_by_row_against_the_first(tmp_path: Path) -> None:
    runs = [run(ready(tmp_path, adapter__rank=rank), launch=Real()) for rank in (2, 4, 8)]
    for place, wrong in zip(runs, (0, 8, 0), strict=True):
        write_json(place.scores, read_json(place.scores) | {"rows": 12})
        write_lines(place.scores_rows, results(wrong))
    table = compare(*runs)
    rows = {str(row[""]): row for row in table.as_rows()}
    change = rows["right answers: change"]
    assert (change["job/0001"], change["job/0002"], change["job/0003"]) == (None, pytest.approx(-8 / 12), 0.0)
    p = rows["right answers: p"]["job/0002"]
    assert p == pytest.approx(2 * 2 / 2**8) and rows["right answers: p"]["job/0003"] == 1.0  # twice by Holm
    assert rows["loss, nats per token: from"]["job/0002"] is not None
    assert "job/0002 against job/0001 on the same 12 held-out rows: right answers -66.7 points (p = 0.02)" in table.note
    assert "job/0003 against job/0001 on the same 12 held-out rows: no difference is shown." in table.note
    runs[0].scores_rows.unlink()
    table = compare(*runs[:2])
    assert "an older version evaluated it" in table.note and not any("change" in str(r[""]) for r in table.as_rows())
    begun = run(ready(tmp_path), until="train", launch=Real())
    assert compare(runs[1], begun).note == "Not tested against each other: job/0004 has no scores yet."
    assert compare(runs[1]).note == ""


# --- errors


def ipython(code: str) -> str:
    """What IPython prints when a cell with this code fails."""
    script = f"""
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance(colors="nocolor")
shell.run_cell({code!r})
"""
    return python(script)


def test_an_error_of_ours_is_its_sentence_in_ipython_and_any_other_a_traceback() -> None:
    shown = ipython("from finetune import load_recipe\nload_recipe('legal_quickstart', 'adapter.rnak=3', 'sed=1')")
    with pytest.raises(RecipeError) as caught:
        finetune.load_recipe("legal_quickstart", "adapter.rnak=3", "sed=1")
    assert shown.splitlines() == caught.value.problems
    assert "Traceback" in ipython("1 / 0")


def test_every_kind_of_error_of_ours_is_shown_as_its_sentence() -> None:
    error: Any = RunError("RUN-004", "what", "why", "this")
    assert error._render_traceback_() == ["RUN-004 what: why. Try: this"]
    assert RecipeError(["a", "b"])._render_traceback_() == ["a", "b"]
    assert check.problems(good()) == []  # the recipe the other tests begin with has none
