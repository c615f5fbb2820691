"""Runs against each other: the same rows by their hashes, tests by hand, Holm, and when nothing is tested."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from finetune.compose import recipe_yaml
from finetune.evaluate.intervals import holm, token_loss, token_loss_change
from finetune.evaluate.metric import Marks
from finetune.evaluate.rows import lines_of, read_lines, write_lines
from finetune.evaluate.score import RowScore
from finetune.pairwise import LOSS, RIGHT, against_first
from finetune.recipe import Recipe
from finetune.rundir import RunDir, write_json, write_text
from tests import toy

WORDS = "a very private question"


def lines(right: list[bool | None], loss: list[float], groups: list[int] | None = None) -> list[dict[str, Any]]:
    """Lines of rows of which tuned is right or not, with these losses; the base's are others."""
    return [
        {
            "row": f"{i:064x}", "input": f"{i + 1000:064x}", "group": groups[i] if groups else i, "tokens": 2 + i % 3,
            "base": {"loss": 9.0, "right": False, "mark": None}, "tuned": {"loss": lost, "right": ok, "mark": None},
        }
        for i, (ok, lost) in enumerate(zip(right, loss, strict=True))
    ]  # fmt: skip


def run(folder: Path, found: list[dict[str, Any]] | None, metric: str = "accuracy") -> RunDir:
    """A run with these results row by row, or an older one without."""
    made = RunDir(folder)
    made.path.mkdir(parents=True)
    write_text(made.recipe, recipe_yaml(Recipe(name="toy")))
    write_json(made.scores, {"rows": len(found) if found else 4, "metric": {"name": metric}})
    if found is not None:
        write_lines(made.scores_rows, found[::-1] if folder.name == "0002" else found)  # the order says nothing
    return made


FIRST = [True] * 9 + [False] * 11
SECOND = [True] * 7 + [False] * 2 + [True] * 9 + [False] * 2
LOSSES = [1.0 + i / 20 for i in range(20)]


# --- the file


def rows() -> list[dict[str, Any]]:
    tok = toy.tokenizer()
    asked = [
        toy.row(tok, i, f"{WORDS} {i % 3}", ["yes", "no"][i % 2], ["yes", "no"], f"customer {i % 2}")
        for i in (0, 1, 2, 0)
    ]
    return [*asked, toy.row(tok, 9, "which licence", "free text", [], "customer 7")]


def scored(rows: list[dict[str, Any]], answer: str, nats: float) -> list[RowScore]:
    return [
        RowScore(np.full(3 + i, -nats - i, np.float32), answer if row["choices"] else None, False)
        for i, row in enumerate(rows)
    ]


def test_a_line_has_hashes_and_figures_and_no_word_of_its_row(tmp_path: Path) -> None:
    asked = rows()
    marks = Marks(name="f1", rows=[1, 4], base=[0.25, 0.5], tuned=[0.75, 1.0])
    found = lines_of(asked, scored(asked, "yes", 2.0), scored(asked, "no", 1.0), marks)
    write_lines(tmp_path / "rows.jsonl", found)
    text = (tmp_path / "rows.jsonl").read_text()
    assert read_lines(tmp_path / "rows.jsonl") == found and len(found) == 5
    assert not any(word in text for word in ("private", "customer", "yes", 'no"', "row-", "licence"))
    assert [line["group"] for line in found] == [0, 1, 0, 0, 2]
    assert found[1]["base"] == {"loss": 3.0, "right": False, "mark": 0.25}
    assert found[1]["tuned"] == {"loss": 2.0, "right": True, "mark": 0.75}
    assert found[4]["tuned"] == {"loss": 5.0, "right": None, "mark": 1.0} and found[0]["tuned"]["mark"] is None
    assert [line["tokens"] for line in found] == [3, 4, 5, 6, 7]
    assert len({line["row"] for line in found}) == 5  # the first and the fourth ask the same
    assert found[0]["input"] == found[3]["input"]


def test_the_hash_of_a_row_is_that_of_its_words_whatever_the_tokenizer_and_empty_keys() -> None:
    row = rows()[0]
    other = row | {
        "messages": [m | {"tool_calls": None} for m in row["messages"]],
        "input_ids": [5, 6],
        "labels": [-100, 6],
    }
    changed = row | {"choices": ["yes", "no", "maybe"]}

    def line(row: dict[str, Any]) -> dict[str, Any]:
        return lines_of([row], scored([row], "yes", 1.0), scored([row], "yes", 1.0), None)[0]

    assert line(row)["row"] == line(other)["row"] != line(changed)["row"]
    assert line(row)["input"] != line(other)["input"]
    assert line(row | {"messages": []})["row"] != line(other | {"messages": []})["row"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: "[]", lambda line: "{", lambda line: json.dumps({k: v for k, v in line.items() if k != "group"}),
        lambda line: json.dumps(line | {"tokens": 0}), lambda line: json.dumps(line | {"tokens": 10**400}),
        lambda line: json.dumps(line | {"tuned": line["tuned"] | {"loss": 10**400}}),
        lambda line: json.dumps(line | {"tuned": {"loss": None}}),
        lambda line: json.dumps(line).replace("9.0", "NaN"), lambda line: json.dumps(line | {"row": 3}),
        lambda line: json.dumps(line).replace("false", "7"), lambda line: "[" * 100_000,
    ],
)  # fmt: skip
def test_a_file_that_is_not_of_that_form_is_said_to_be_none(tmp_path: Path, damage: Any) -> None:
    first, *rest = lines(FIRST, LOSSES)
    (tmp_path / "rows.jsonl").write_text("\n".join([damage(first), *map(json.dumps, rest)]))
    with pytest.raises(ValueError, match=r"rows.jsonl does not hold results row by row"):
        read_lines(tmp_path / "rows.jsonl")


# --- the tests


def test_two_runs_get_mcnemars_test_and_the_paired_t_of_their_rows(tmp_path: Path) -> None:
    other = [loss - 0.1 - (i % 2) / 10 for i, loss in enumerate(LOSSES)]
    pair = [run(tmp_path / "0001", lines(FIRST, LOSSES)), run(tmp_path / "0002", lines(SECOND, other))]
    (tested,) = against_first(pair)
    right, loss = tested.differences
    assert (right.measure, right.rows, right.better, right.worse) == (RIGHT, 20, 9, 2)
    assert right.change == pytest.approx(7 / 20)
    assert right.p == right.adjusted == pytest.approx(2 * sum(math.comb(11, k) for k in (0, 1, 2)) / 2**11)
    assert loss.measure == LOSS and (loss.better, loss.worse) == (20, 0)
    tokens = np.array([2 + i % 3 for i in range(20)])
    change = np.array(other) - np.array(LOSSES)
    assert loss.change == pytest.approx((change * tokens).sum() / tokens.sum())
    assert loss.low is not None and loss.high is not None and loss.low < loss.change < loss.high < 0
    assert loss.p == pytest.approx(stats.ttest_rel(other, LOSSES).pvalue)
    said = f"B against A on the same 20 held-out rows: loss, nats per token {loss.change:+.4f} (p = {loss.p:.1g})."
    assert tested.sentence("B", "A") == said  # of right answers p is 0.07


def test_rows_of_one_group_are_counted_once_where_there_are_groups(tmp_path: Path) -> None:
    groups = [i // 5 for i in range(60)]
    base = [1.0 + (g % 3) for g in groups]
    tuned = [loss - (2.0 if g == 0 else 0.0) for loss, g in zip(base, groups, strict=True)]
    nats, tokens = np.array(base), [1] * 60
    alone = token_loss_change(nats.tolist(), tuned, tokens, [str(i) for i in range(60)], 0.95, 0)
    grouped = token_loss_change(nats.tolist(), tuned, tokens, [str(g) for g in groups], 0.95, 0)
    assert alone["change"] == grouped["change"] == pytest.approx(-2 * 5 / 60)
    assert alone["test"]["p"] < 0.05 < grouped["test"]["p"]
    assert grouped["test"]["test"] == "paired t, over 12 groups" and (
        grouped["test"]["wins"],
        grouped["test"]["losses"],
    ) == (1, 0)
    assert grouped["high"] - grouped["low"] > alone["high"] - alone["low"]
    right = [g == 0 for g in groups]
    pair = [
        run(tmp_path / "0001", lines([False] * 60, base, groups)),
        run(tmp_path / "0002", lines(right, tuned, groups)),
    ]
    (tested,) = against_first(pair)
    by_row, once, loss = tested.differences
    assert once.measure == "right answers, each group once" and (once.better, once.worse, once.p) == (1, 0, 1.0)
    assert by_row.p == 0.0625 and loss.p == grouped["test"]["p"]


def test_what_one_group_alone_shows_is_said_with_that(tmp_path: Path) -> None:
    groups = [0] * 12 + [1] * 12
    pair = [
        run(tmp_path / "0001", lines([False] * 24, [1.0] * 24, groups)),
        run(tmp_path / "0002", lines([True] * 12 + [False] * 12, [1.0] * 24, groups)),
    ]
    (tested,) = against_first(pair)
    assert tested.sentence("B", "A") == (
        "B against A on the same 24 held-out rows: right answers +50.0 points (p = 0.0005), which counting each group "
        "once does not show (p = 1)."
    )


def test_the_interval_of_a_difference_in_loss_holds_the_truth_as_often_as_it_says() -> None:
    dice = np.random.default_rng(3)
    inside = 0
    for _ in range(300):
        tokens = dice.integers(1, 9, 60)
        base = dice.gamma(2.0, 1.0, 60) * tokens
        tuned = base + (dice.normal(-0.1, 0.5, 60)) * tokens
        found = token_loss_change(base.tolist(), tuned.tolist(), tokens.tolist(), [str(i) for i in range(60)], 0.95, 1)
        inside += found["low"] <= -0.1 <= found["high"]
    assert 0.9 < inside / 300 < 0.98
    told = token_loss(base.tolist(), tokens.tolist(), [str(i) for i in range(60)], 0.95, 1)
    mine = token_loss(tuned.tolist(), tokens.tolist(), [str(i) for i in range(60)], 0.95, 1)
    assert found["change"] == pytest.approx(mine["loss"] - told["loss"])


def test_holms_correction_is_that_of_the_paper_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []


def test_several_runs_are_corrected_each_measure_by_itself(tmp_path: Path) -> None:
    found = [FIRST, SECOND, [True] * 18 + [False] * 2, FIRST]
    runs = [run(tmp_path / f"000{i}", lines(right, LOSSES)) for i, right in enumerate(found, 1)]
    tested = against_first(runs)
    right = [each.differences[0] for each in tested]
    assert [d.measure for d in right] == [RIGHT] * 3
    assert [d.adjusted for d in right] == pytest.approx(holm([d.p for d in right if d.p is not None]))
    assert right[1].p == pytest.approx(2 / 2**9) and right[1].adjusted == pytest.approx(3 * 2 / 2**9)
    assert right[1].shown and not right[0].shown and right[2].p == right[2].adjusted == 1.0
    assert all(each.differences[-1].p is None and each.differences[-1].adjusted is None for each in tested)
    assert tested[2].sentence("D", "A") == "D against A on the same 20 held-out rows: no difference is shown."


# --- when nothing is tested


def test_other_rows_an_older_run_and_a_damaged_file_are_said_and_nothing_is_tested(tmp_path: Path) -> None:
    first = run(tmp_path / "0001", lines(FIRST, LOSSES))
    old = run(tmp_path / "0003", None)
    fewer = run(tmp_path / "0004", lines(FIRST, LOSSES)[:15])
    broken = run(tmp_path / "0005", lines(FIRST, LOSSES))
    broken.scores_rows.write_text("{")
    cut = run(tmp_path / "0006", lines(FIRST, LOSSES))
    write_lines(cut.scores_rows, lines(FIRST, LOSSES)[:15])
    told = against_first([first, old, fewer, broken, cut])
    assert all(each.differences == [] and each.rows == 0 for each in told)
    assert [each.sentence("X", "A") for each in told] == [
        "X is not tested against A: X has no scores_rows.jsonl: an older version evaluated it.",
        "X is not tested against A: their held-out rows are not the same: 15 of 20 and 15 are in both.",
        "X is not tested against A: X has a scores_rows.jsonl that cannot be read.",
        "X is not tested against A: X has a scores_rows.jsonl that is not of its scores.",
    ]
    (other,) = against_first([old, first])
    assert (
        other.sentence("X", "A")
        == "X is not tested against A: A has no scores_rows.jsonl: an older version evaluated it."
    )


def test_losses_of_other_tokens_and_other_metrics_are_not_tested_and_the_answers_are(tmp_path: Path) -> None:
    first = run(tmp_path / "0001", lines(FIRST, LOSSES))
    other = [line | {"input": "f" * 64} for line in lines(SECOND, LOSSES)]
    (tested,) = against_first([first, run(tmp_path / "0002", other, metric="f1")])
    assert [d.measure for d in tested.differences] == [RIGHT]
    assert len(tested.notes) == 2 and "accuracy and f1" in tested.notes[0] and "other tokens" in tested.notes[1]


def marked(right: list[Any], marks: list[float | None]) -> list[dict[str, Any]]:
    found = lines(right, LOSSES)
    for line, mark in zip(found, marks, strict=True):
        line["tuned"]["mark"] = mark
    return found


def test_marks_are_tested_on_the_rows_that_both_have_marked(tmp_path: Path) -> None:
    old, new = (
        [None] * 4 + [value(i) for i in range(16)] for value in (lambda i: i / 16, lambda i: (i + 1 + i % 2) / 18)
    )
    first = run(tmp_path / "0001", marked([None] * 20, old), metric="f1")
    (tested,) = against_first([first, run(tmp_path / "0002", marked([None] * 20, new), metric="f1")])
    assert [d.measure for d in tested.differences] == ["f1", LOSS] and tested.differences[0].rows == 16
    assert tested.differences[0].p == pytest.approx(stats.ttest_rel(new[4:], old[4:]).pvalue)
    (tested,) = against_first([first, run(tmp_path / "0003", marked([None] * 20, new[::-1]), metric="f1")])
    assert [d.measure for d in tested.differences] == [LOSS] and "metric_rows=0" in tested.notes[0]
