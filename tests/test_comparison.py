"""Several runs on one page: what differs, what is said of it, and which words are refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.__main__ import main
from finetune.compose import read_recipe, recipe_yaml
from finetune.evaluate.rows import write_lines
from finetune.pairwise import against_first
from finetune.report.comparison import compare_runs, differences, same_heldout
from finetune.report.gather import gather
from finetune.rundir import RunDir, read_json, write_json
from tests.finished_run import NASTY, finished, results, with_everything
from tests.test_report import POLICY, Page


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    """Three runs that differ in rank and rate; the third has a lower loss, and more that was measured."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    folder.mkdir()
    made = [finished(folder / f"{number:04}") for number in (1, 2, 3)]
    for run, rank in zip(made, (8, 16, 16), strict=True):
        recipe = read_recipe(run.recipe)
        recipe.adapter.rank, recipe.runs_dir = rank, str(run.path)
        run.recipe.write_text(recipe_yaml(recipe))
        write_json(run.record, {"outputs": {"data/heldout.arrow": "ab" * 32, "data/train.arrow": run.path.name}})
    recipe = read_recipe(made[2].recipe)
    made[2].recipe.write_text(recipe_yaml(replace(recipe, train=replace(recipe.train, lr=0.003))))
    with_everything(made[2], updates=40)
    scores = read_json(made[2].scores)
    scores["tuned"]["loss"] = 0.25
    write_json(made[2].scores, scores)
    write_lines(made[2].scores_rows, results(wrong=8))
    return made


@pytest.fixture(scope="module")
def text(runs: list[RunDir]) -> str:
    return compare_runs(runs, against_first(runs))


def test_only_settings_that_differ_are_listed(runs: list[RunDir], text: str) -> None:
    told = differences([gather(run)["recipe"] for run in runs])
    assert told == [("adapter.rank", ["8", "16", "16"]), ("train.lr", ["0.0002", "0.0002", "0.003"])]
    words = Page(text).text
    assert "setting A B C adapter.rank 8 16 16 train.lr 0.0002 0.0002 0.003" in words
    assert "runs_dir" not in words


def test_another_base_is_one_line_and_not_its_whole_card(runs: list[RunDir]) -> None:
    one = gather(runs[0])["recipe"]
    other = one | {"model": one["model"] | {"name": "another", "licence": "mit", "note": "other"}}
    assert differences([one, other]) == [("model.name", ["unnamed", "another"])]


def test_the_table_has_gain_loss_forgetting_drift_cost_parity_and_licence(text: str) -> None:
    words = Page(text).text.replace(" " + NASTY, "")
    for part in (
        "3 runs compared", "Lowest held-out loss: run C, 0.2500 nats per token.",
        "Most right answers: runs A and B and C, 100.0 %.",
        "A toy/0001 100.0 % (75.8 to 100.0) +25.0 points (",
        "C toy/0003 100.0 % (75.8 to 100.0) +25.0 points (",
        "0.6075 2.855 not measured",
        "0.25 2.855 \u22122.1 points",
        "\u2717 evaluate.max_refusal_drop",
        "A 91.5 s 0.0254 h \u2013 \u2013 7 of 8 alike not measured \u2713 Yes, with 1 duty",
        "Regression against base: refuses harmful prompts 81.0 % to 62.0 %",
        "All were scored on the same held-out rows.",
        "Run B against run A on the same 12 held-out rows: no difference is shown.",
        "Run C against run A on the same 12 held-out rows: right answers -66.7 points (p = 0.02), which counting each "
        "group once does not show (p = 0.25); loss, nats per token +0.6944 (p = ",
        "p below 0.05, corrected by Holm's method for the 2 tests of each measure",
        "right answers, each group once: sign test, exact, two-sided, over 6 groups",
        "C right answers 12 \u221266.7 points (",
    ):  # fmt: skip
        assert part in words, part


def test_two_runs_have_no_corrected_p_and_runs_that_cannot_be_tested_say_why(
    runs: list[RunDir], tmp_path: Path
) -> None:
    words = Page(compare_runs(runs[:2], against_first(runs[:2]))).text
    assert "Tested row by row against run A" in words and "Holm" not in words and "corrected" not in words
    old = finished(tmp_path / "old")
    old.scores_rows.unlink()
    write_json(old.record, read_json(runs[0].record))
    words = Page(compare_runs([runs[0], old], against_first([runs[0], old]))).text
    assert "Run B is not tested against run A: Run B has no scores_rows.jsonl: an older version evaluated it." in words
    assert "Tested row by row" not in words and "All were scored on the same held-out rows." in words


def test_the_comparison_loads_nothing_runs_nothing_and_its_ids_are_its_own(text: str) -> None:
    page = Page(text)
    assert "<script" not in text
    assert {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object", "base", "form"} == set()
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    loads = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "xlink:href")]
    assert loads and all(v and v.startswith("#") for v in loads)
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}) in page.tags
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert "refuses harmful prompts" in page.text and "Base " + NASTY in page.text


def test_every_run_has_a_curve_with_a_dash_of_its_own(text: str) -> None:
    svg = next(
        found for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL) if "Training loss of every run" in found
    )
    assert [f"run {letter}" in svg for letter in "ABCD"] == [True, True, True, False]
    assert len(set(re.findall(r"stroke-dasharray: ([\d. ,]+)", svg))) == 2  # and the first is whole
    assert {f"var(--run-{n})" for n in (1, 2, 3)} <= set(re.findall(r"var\(--run-\d\)", svg))


def test_rows_are_the_same_only_where_the_records_say_so(runs: list[RunDir]) -> None:
    facts = [gather(run) for run in runs]
    assert same_heldout(runs, facts) is True
    before = read_json(runs[1].record)
    write_json(runs[1].record, {"outputs": {"data/heldout.arrow": "cd" * 32}})
    assert same_heldout(runs, facts) is False
    runs[1].record.unlink()
    assert same_heldout(runs, facts) is None
    write_json(runs[1].record, before)
    facts[0]["recipe"]["evaluate"]["rows"] = 2  # two of three, drawn by the seed
    assert same_heldout(runs, facts) is False


def test_the_verb_writes_the_page_and_leaves_the_runs_alone(
    runs: list[RunDir], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for run in runs for path in run.path.rglob("*")}
    out = tmp_path / "new" / "compare.html"
    assert main(["report", "compare", f"runs=[{runs[0].path},{runs[1].path}]", f"out={out}"]) == 0
    assert "2 runs compared: " in capsys.readouterr().out
    assert "2 runs compared" in out.read_text(encoding="utf-8")
    assert "Run B against run A on the same 12 held-out rows: " in out.read_text(encoding="utf-8")
    assert before == {path: path.stat().st_mtime_ns for run in runs for path in run.path.rglob("*")}


def test_all_that_is_wrong_with_the_words_is_said_at_once(
    runs: list[RunDir], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    unfinished = RunDir(tmp_path / "unfinished")
    unfinished.path.mkdir()
    unfinished.recipe.write_bytes(runs[0].recipe.read_bytes())
    names = f"{runs[0].path},{tmp_path / 'nothing'},unfinished,{runs[0].path}"
    assert main(["report", "compare", f"runs=[{names}]", "out=compare.txt", "size=3"]) == 2
    said = capsys.readouterr().err
    for part in (
        "CFG-010 report compare: size= is not known here", "RPT-001 out=compare.txt does not end with .html",
        f"RPT-004 {tmp_path / 'nothing'} is not a run folder",
        "RPT-005 unfinished has no scores: its evaluate stage has not finished. Type: python -m finetune evaluate run=",
        f"RPT-003 {runs[0].path} stands twice",
    ):  # fmt: skip
        assert part in said, part
    assert not list(tmp_path.glob("compare*"))
    for words in ([], ["runs=[]"], [f"runs=[{runs[0].path}]"]):
        assert main(["report", "compare", *words]) == 2
        assert "RPT-002" in capsys.readouterr().err
    assert main(["report", "compare", f"run={runs[0].path}"]) == 2
    assert "run= is not known here, runs= is" in capsys.readouterr().err


def test_the_page_of_an_unfinished_run_is_written_beside_it_and_does_not_end_it(
    runs: list[RunDir], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    begun = RunDir(tmp_path / "begun")
    begun.path.mkdir()
    begun.recipe.write_bytes(runs[0].recipe.read_bytes())
    assert main(["report", "page", "run=begun"]) == 0
    assert f"the run as it is now: {tmp_path / 'page.html'}" in capsys.readouterr().out
    assert "Not finished yet: data, train" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not begun.report.exists()
    assert main(["report", "page", "out=x.pdf", "rows=3"]) == 2
    said = capsys.readouterr().err
    assert "CFG-010 report page takes run=PATH" in said and "RPT-001 out=x.pdf" in said and "rows= is not known" in said
    assert main(["report", "page", "run=nowhere"]) == 3
    assert "RUN-004" in capsys.readouterr().err
