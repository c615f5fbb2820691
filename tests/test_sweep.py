"""A sweep's folder: what is kept, what goes on, and what is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from finetune import sweep
from finetune.errors import RecipeError, RunError
from finetune.rundir import RunDir, read_json, write_json
from finetune.sweep_folder import create_sweep, read_sweep
from finetune.sweep_plot import Point, draw_sweep
from finetune.sweep_table import write_results
from tests.job import ready

QUIET = Console(quiet=True)


def words(tmp_path: Path, *swept: str) -> list[str]:
    """The words of a sweep over a base that is a folder here."""
    ready(tmp_path)
    places = [f"runs_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path}", f"model.source={tmp_path / 'base'}"]
    return ["recipe=legal_quickstart", *places, *swept]


class Jobs:
    """Stands in for the processes of jobs: gives what `codes` says, and writes scores for 0 and 4."""

    def __init__(self, *codes: int) -> None:
        self.codes, self.done = list(codes), []

    def __call__(self, words: list[str]) -> int:
        run_dir = RunDir(Path(words[1].removeprefix("run=")))
        self.done.append((words[0], run_dir.path.name))
        code = self.codes.pop(0)
        if code in (0, 4):
            loss = 1 + int(run_dir.path.name) / 10
            write_json(run_dir.scores, {"tuned": {"loss": loss, "accuracy": 0.5}, "base": {"loss": 2.5}, "gates": []})
        return code


def test_every_job_stays_in_the_table_and_the_file_with_its_exit_code(tmp_path):
    jobs = Jobs(0, 3, 4)
    assert sweep.sweep(words(tmp_path, "adapter.rank=2,4,8"), None, "evaluate", QUIET, jobs) == 3
    folder = tmp_path / "runs" / "legal_quickstart" / "sweep-0001"
    kept = read_json(folder / "sweep.json")
    assert [(job["words"], job["run"], job["exit_code"], job["tuned_loss"]) for job in kept["jobs"]] == [
        (["adapter.rank=2"], "../0001", 0, 1.1),
        (["adapter.rank=4"], "../0002", 3, None),
        (["adapter.rank=8"], "../0003", 4, 1.3),
    ]
    table = (folder / "sweep.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in table[4:]] == [
        ["| adapter.rank=2", "1.1000"],
        ["| adapter.rank=8", "1.3000 (exit code 4)"],
        ["| adapter.rank=4", "failed, exit code 3"],
    ]
    assert "adapter.rank=2,4,8" in table[0]
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_sweep_says_how_it_goes_on_and_goes_on_with_what_is_left(tmp_path, capsys):
    given = words(tmp_path, "adapter.rank=2,4,8,16")
    first = Jobs(0, 3, 130)
    assert sweep.sweep(given, None, "evaluate", Console(width=300), first) == 3
    folder = tmp_path / "runs" / "legal_quickstart" / "sweep-0001"
    shown = capsys.readouterr().out
    assert f"to continue: python -m finetune -m sweep={folder}\n" in shown and shown.count("  stopped  ") == 2

    with pytest.raises(RecipeError, match=rf"SWP-001 {folder} has the same jobs, 2 of 4 are left\. Type: .*sweep="):
        sweep.sweep(given, None, "evaluate", QUIET, Jobs())
    assert len(list(folder.parent.glob("0*"))) == 4

    second = Jobs(0, 0, 0)
    assert sweep.sweep([f"sweep={folder}"], None, "run", Console(width=300), second) == 0
    assert second.done == [("evaluate", name) for name in ("0002", "0003", "0004")]
    shown = capsys.readouterr().out
    assert "0001: done before" in shown and "to continue" not in shown
    assert [job["exit_code"] for job in read_json(folder / "sweep.json")["jobs"]] == [0, 0, 0, 0]
    sweep.sweep(given, None, "evaluate", QUIET, Jobs(0, 0, 0, 0))  # all done: the same words begin anew
    assert (folder.parent / "sweep-0002" / "sweep.json").is_file()


def test_ctrl_c_in_this_process_too_leaves_a_sweep_that_says_how_it_goes_on(tmp_path, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(words(tmp_path, "adapter.rank=2,4"), None, "evaluate", Console(width=300), interrupted)
    folder = tmp_path / "runs" / "legal_quickstart" / "sweep-0001"
    assert f"sweep={folder}" in capsys.readouterr().out
    assert [job.exit_code for job in read_sweep(folder).jobs] == [None, None]


def test_a_sweep_that_is_moved_finds_its_runs(tmp_path):
    sweep.sweep(words(tmp_path, "adapter.rank=2,4"), None, "evaluate", QUIET, Jobs(0, 0))
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    found = read_sweep(tmp_path / "elsewhere" / "legal_quickstart" / "sweep-0001")
    assert [job.tuned_loss() for job in found.jobs] == [1.1, 1.2]


def test_a_sweep_is_continued_as_it_is_or_not_at_all(tmp_path):
    with pytest.raises(RecipeError, match="SWP-003 a sweep keeps its settings"):
        sweep.sweep(["sweep=x", "adapter.rank=2"], None, "run", QUIET)
    with pytest.raises(RunError, match=r"SWP-002 sweep=.* is not the folder of a sweep: it has no sweep\.json"):
        sweep.sweep([f"sweep={tmp_path}"], None, "run", QUIET)


def drawn(tmp_path: Path, monkeypatch, points: list[Point], base: list[float]):
    """The axes of a plot."""
    figures = []
    monkeypatch.setattr("finetune.sweep_plot.save_png", lambda figure, target: figures.append(figure))
    draw_sweep(tmp_path / "x.png", points, base)
    return figures[0].axes[0]


def test_one_setting_lies_along_the_axis_in_the_order_of_its_numbers(tmp_path, monkeypatch):
    losses = {"1e-3": 1.6, "1e-5": 2.3, "1e-4": 1.7}
    points = [Point({"train.lr": lr}, loss, False) for lr, loss in losses.items()]
    points.append(Point({"train.lr": "1e-2"}, float("inf"), True))
    axes = drawn(tmp_path, monkeypatch, points, [2.5])
    assert axes.get_xlabel() == "train.lr"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1e-5", "1e-4", "1e-3", "1e-2"]
    line, lost, base = axes.get_lines()
    assert list(line.get_ydata()) == [2.3, 1.7, 1.6]
    assert list(lost.get_xdata()) == [axes.get_xticks()[3]] and lost.get_label() == "a job failed"
    assert set(base.get_ydata()) == {2.5}
    assert axes.get_title(loc="left") == "lowest: 1.6000 with train.lr=1e-3"


def test_a_second_setting_has_a_line_for_each_of_its_values(tmp_path, monkeypatch):
    points = [
        Point({"adapter.targets": t, "adapter.rank": r}, float(r) + len(t), False)
        for t in ("all", "attention")
        for r in ("16", "4", "8")
    ]
    axes = drawn(tmp_path, monkeypatch, points, [3.0, 4.0])
    assert axes.get_xlabel() == "adapter.rank"  # numbers lie along the axis, names do not
    found = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert found == {"adapter.targets=all": [7, 11, 19], "adapter.targets=attention": [13, 17, 25]}


def test_names_that_would_stand_on_each_other_are_spread(tmp_path, monkeypatch):
    points = [Point({"train.lr": lr}, 1.0, False) for lr in ("1e-4", "1e-3", "1e30")]
    axes = drawn(tmp_path, monkeypatch, points, [])
    assert list(axes.get_xticks()) == [0, 1, 2]


def test_more_settings_are_bars_the_lowest_on_top(tmp_path, monkeypatch):
    points = [Point({"a": a, "b": b, "seed": s}, float(a + b + s), False) for a in "12" for b in "12" for s in "12"]
    points[3] = Point(points[3].settings, float("inf"), True)
    axes = drawn(tmp_path, monkeypatch, points, [999.0])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[-1] == "a=1 b=1 seed=1" and names[0] == "a=1 b=2 seed=2"
    assert len(axes.patches) == 8 and axes.texts[0].get_text() == " failed"


def test_a_sweep_without_scores_has_a_table_and_no_plot(tmp_path):
    run_dir = RunDir(tmp_path / "0001")
    run_dir.path.mkdir()
    made = create_sweep(["a=1,2"], "train", [sweep.Job(("a=1",), run_dir, 0)])
    write_results(made)
    assert "not scored" in (made.path / "sweep.md").read_text() and not (made.path / "sweep.png").exists()
