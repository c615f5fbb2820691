from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from finetune.evaluate import metric
from finetune.evaluate.intervals import change_of, mean_of, paired_shares, token_loss
from finetune.evaluate.metric import Marks, by_answer, exact, f1, number, rouge_l
from finetune.evaluate.slices import slices
from tests.test_evaluate import conclude


def pairs(both: int, ours: int, theirs: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Marks of two models on the same rows, by how many each has right."""
    return [True] * (both + ours) + [False] * (theirs + neither), (
        [True] * both + [False] * ours + [True] * theirs + [False] * neither
    )


def test_the_paired_interval_is_the_one_that_newcombe_published() -> None:
    assert paired_shares(*pairs(36, 12, 2, 0), 0.95) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)
    change, low, high = paired_shares(*pairs(30, 0, 0, 30), 0.95)  # no row differs
    assert change == 0 and low < -0.01 and high > 0.01


def test_the_paired_interval_holds_the_true_change_about_as_often_as_it_says() -> None:
    draw, hits, times = np.random.default_rng(5), 0, 1500
    share = np.array([0.5, 0.25, 0.1, 0.15])  # both, ours alone, theirs alone, neither: the true change is 0.15
    for _ in range(times):
        _, low, high = paired_shares(*pairs(*draw.multinomial(60, share)), 0.9)
        hits += low <= 0.15 <= high
    assert 0.87 < hits / times < 0.94


def test_perplexity_is_exp_of_the_token_loss_and_its_interval_that_of_a_bootstrap_by_hand() -> None:
    nats, tokens = [3.0, 1.0, 2.5, 8.0, 0.5, 4.0], [3, 1, 2, 5, 1, 2]
    told = token_loss(nats, tokens, list("abcdef"), 0.8, 7)
    assert told["loss"] == pytest.approx(19 / 14) and told["perplexity"] == pytest.approx(math.exp(19 / 14))
    draw, means = random.Random(1), []
    for _ in range(20_000):
        places = draw.choices(range(6), k=6)
        means.append(sum(nats[i] for i in places) / sum(tokens[i] for i in places))
    low, high = np.percentile(means, (10, 90))
    assert (told["loss_low"], told["loss_high"]) == pytest.approx((low, high), abs=0.03)
    assert told["perplexity_low"] == pytest.approx(math.exp(told["loss_low"]))
    assert told == token_loss(nats, tokens, list("abcdef"), 0.8, 7) != token_loss(nats, tokens, list("abcdef"), 0.8, 8)
    assert told["interval"] == "bootstrap, percentiles of 2000 draws of 6 rows, seed 7"


def test_rows_of_one_group_are_drawn_together_and_the_interval_is_wider_for_it() -> None:
    nats = [float(i // 10) for i in range(200)]  # rows of a group are all alike
    groups = [f"g{i // 10}" for i in range(200)]
    together, apart = (token_loss(nats, [1] * 200, names, 0.95, 0) for names in (groups, [str(i) for i in range(200)]))
    assert "20 groups" in together["interval"] and "200 rows" in apart["interval"]
    assert together["loss_high"] - together["loss_low"] > 2.5 * (apart["loss_high"] - apart["loss_low"])
    few = token_loss(nats, [1] * 200, ["a", "b"] * 100, 0.95, 0)
    assert "200 rows (too few groups to draw: 2)" in few["interval"]
    one = token_loss([1e6], [1], ["a"], 0.95, 0)
    assert one["loss_low"] is one["perplexity"] is None


def test_marks_between_right_and_wrong_get_intervals_of_means() -> None:
    assert mean_of([1, 0, 1, 1], 0.95, 0)[1:] == pytest.approx((0.3006, 0.9544), abs=1e-4)  # Wilson
    value, low, high = mean_of([0.5, 0.1, 0.9, 0.4], 0.95, 0)
    assert value == pytest.approx(0.475) and low is not None and high is not None and low < value < high
    told = change_of([0.5, 0.1, 0.9], [0.6, 0.1, 0.7], 0.95)
    assert told["test"]["test"] == "paired t, by row" and (told["test"]["wins"], told["test"]["losses"]) == (1, 1)
    assert change_of([1, 0], [1, 1], 0.95)["test"]["test"].startswith("McNemar")


def test_metrics_mark_what_they_say() -> None:
    assert exact("The  answer.", "the answer") == 1 and exact("the answer", "an answer") == 0
    assert number("so #### 1,200", "It is 12 times 100 = 1200.0.") == 1 and number("7", "seven") == 0
    assert number("-3.5", "x = -3.5") == 1 and number("3", "4 or 3?") == 1
    assert f1("red and blue", "blue paint") == pytest.approx(2 * 1 / 5) and f1("red", "blue") == 0
    pytest.importorskip("rouge_score")
    assert rouge_l("a b c d", "a x c d") == pytest.approx(0.75)


def test_an_answer_that_was_cut_is_marked_as_far_as_it_goes_and_counted() -> None:
    marks = by_answer("exact", [4, 5], ["yes", "no"], ["yes …", "yes"], ["yes", "no"])
    assert (marks.base, marks.tuned, marks.cut) == ([1, 0], [1, 1], (1, 0))
    told = metric.told(marks, 0.95, 0)
    assert told is not None and told["change"] == 0.5 and told["base"]["cut"] == 1


def test_slices_have_their_own_counts_and_small_ones_are_one() -> None:
    rows: list[dict[str, Any]] = [
        {"answer": "abcde"[min(i // 12, 4)] if i < 40 else f"x{i}", "group": "one", "prompt_length": i + 1}
        for i in range(48)
    ]
    marks = Marks(name="accuracy", rows=list(range(48)), base=[0.0] * 48, tuned=[1.0] * 12 + [0.0] * 36)
    found = slices(rows, marks, ["answer", "group", "length"], 0.95, 0)
    by_answer_ = [(s["value"], s["rows"], s["tuned"]["accuracy"]) for s in found if s["by"] == "answer"]
    assert by_answer_ == [("a", 12, 1.0), ("b", 12, 0.0), ("c", 12, 0.0), ("other", 12, 0.0)]
    assert found[0]["test"]["wins"] == 12 and found[0]["base"]["high"] == pytest.approx(0.2425, abs=1e-4)
    assert not [s for s in found if s["by"] == "group"]  # all rows share it
    lengths = [s for s in found if s["by"] == "length"]
    assert [s["rows"] for s in lengths] == [12] * 4 and sum(s["tuned"]["accuracy"] for s in lengths) == 1.0
    assert slices(rows, None, ["answer"], 0.95, 0) == []


def test_the_scores_carry_the_metric_and_slices_that_follow_from_the_choices() -> None:
    truth = ["P"] * 20 + ["C"] * 20
    made = conclude(truth, ["P"] * 40, ["P"] * 20 + ["C"] * 15 + ["P"] * 5, ["P"], slices=["answer"])
    assert made["metric"]["name"] == "accuracy" and made["metric"]["change"] == pytest.approx(15 / 40)
    assert made["metric"]["base"]["value"] == made["base"]["accuracy"]
    assert [(s["value"], s["base"]["accuracy"], s["tuned"]["accuracy"]) for s in made["slices"]] == [
        ("C", 0.0, 0.75),
        ("P", 1.0, 1.0),
    ]
    assert made["forgetting"] is made["safety"] is None
    assert conclude(truth, ["P"] * 40, ["C"] * 40, ["P"], metric="none")["metric"] is None
