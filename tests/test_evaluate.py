from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

import finetune.evaluate as evaluation
from finetune.errors import DataError, GateError, NumbersError, RunError
from finetune.evaluate import drift, harness
from finetune.evaluate import score as scoring
from finetune.evaluate import verdict as say
from finetune.evaluate.rows import read_lines
from finetune.evaluate.score import continuations, greedy, prompt_of, score_rows
from finetune.recipe import Evaluate, Recipe
from finetune.record import output_names
from finetune.rundir import RunDir, read_json
from tests import toy

YES_NO = ["yes", "no", "maybe"]
ALIKE = ["Permissive", "Permissive licence", "Copyleft"]


@pytest.fixture(scope="module")
def tok() -> Any:
    return toy.tokenizer()


@pytest.fixture
def rows(tok: Any) -> list[dict[str, Any]]:
    questions = ["is this a licence" + " which licence" * (i % 5) + f" {i}" for i in range(11)]
    return [toy.row(tok, i, q, YES_NO[i % 3], YES_NO, f"group-{i % 4}") for i, q in enumerate(questions)]


def alone(model: Any, ids: list[int]) -> np.ndarray:
    """Log-probabilities of every next token, one row, no padding, float64."""
    with torch.no_grad():
        logits = model.double()(input_ids=torch.tensor([ids], device=model.device)).logits[0].numpy()
    model.float()
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def test_the_loss_is_that_of_each_row_alone_in_float64(tok: Any, rows: list[dict[str, Any]]) -> None:
    model = toy.model()
    rows.append(toy.row(tok, 99, "which licence is this", "no", [], earlier=("is this yes", "maybe a licence")))
    for row, score in zip(rows, score_rows(model, tok, rows, batch_size=4), strict=True):
        table = alone(model, row["input_ids"])
        expected = [table[t - 1, x] for t, x in enumerate(row["labels"]) if x != -100]
        np.testing.assert_allclose(score.logprobs, expected, atol=2e-5)
        assert score.loss == pytest.approx(-np.mean(expected), abs=2e-5)
    assert len(score.logprobs) > len(tok("no").input_ids) + 1  # both turns of the last row were counted


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_depend_neither_on_the_batch_nor_on_the_tokenizers_padding_side(
    tok: Any, rows: list[dict[str, Any]], batch_size: int, side: str
) -> None:
    model = toy.model()
    one = [alone(model, row["input_ids"]) for row in rows]
    tok.padding_side = side
    for row, table, score in zip(rows, one, score_rows(model, tok, rows, batch_size), strict=True):
        assert score.choice == max(row["choices"], key=lambda c: table[row["prompt_length"] - 1, tok(c).input_ids[0]])
        assert score.loss == pytest.approx(
            -np.mean([table[t - 1, x] for t, x in enumerate(row["labels"]) if x != -100]), abs=2e-5
        )


def test_padding_on_the_left_with_position_ids_gives_the_same_loss(tok: Any, rows: list[dict[str, Any]]) -> None:
    model = toy.model()
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([[0] * (width - len(row["input_ids"])) + row["input_ids"] for row in rows])
    mask = torch.tensor([[0] * (width - len(row["input_ids"])) + [1] * len(row["input_ids"]) for row in rows])
    labels = torch.tensor([[-100] * (width - len(row["labels"])) + row["labels"] for row in rows])
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 320), labels[:, 1:].reshape(-1), ignore_index=-100
    )
    scores = score_rows(model, tok, rows, batch_size=4)
    assert -np.concatenate([s.logprobs for s in scores]).mean() == pytest.approx(loss.item(), abs=2e-5)


def test_a_model_that_cannot_narrow_its_head_gives_the_same_scores(tok: Any, rows: list[dict[str, Any]]) -> None:
    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = toy.model()
            self.device = self.inner.device
            self.get_output_embeddings = self.inner.get_output_embeddings

        def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    for narrow, wide in zip(score_rows(toy.model(), tok, rows, 4), score_rows(Wide(), tok, rows, 4), strict=True):
        np.testing.assert_allclose(narrow.logprobs, wide.logprobs, atol=1e-5)


def test_a_bf16_model_is_scored_with_fp32_logits(tok: Any, rows: list[dict[str, Any]]) -> None:
    """Its own bf16 logits are coarse: they tie where fp32 ones do not."""
    model = toy.model().to(torch.bfloat16)
    scores = score_rows(model, tok, rows, 4)
    logprobs = np.concatenate([np.asarray(score.logprobs) for score in scores])
    rounded = torch.tensor(logprobs).bfloat16().double().numpy()
    assert not np.array_equal(logprobs, rounded)
    row = rows[0]
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        logits = hidden.float() @ model.lm_head.weight.float().T
    wanted = torch.log_softmax(logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
    places = [i for i, label in enumerate(row["labels"]) if label != -100]
    np.testing.assert_allclose(scores[0].logprobs, wanted[[p - 1 for p in places]].numpy(), atol=0.05)
    assert not model.lm_head._forward_hooks  # the hook is gone


def test_the_head_is_applied_only_where_an_answer_is(tok: Any, rows: list[dict[str, Any]]) -> None:
    model, widths = toy.model(), []
    model.lm_head.register_forward_hook(lambda _m, args, _o: widths.append(args[0].shape[1]))
    score_rows(model, tok, rows, batch_size=1)
    assert widths == [
        len([x for x in row["labels"] if x != -100]) for row in sorted(rows, key=lambda r: -len(r["input_ids"]))
    ]


@pytest.mark.parametrize("seed", range(4))
def test_choices_that_begin_alike_are_compared_by_their_whole_likelihood(tok: Any, seed: int) -> None:
    assert tok(ALIKE[0]).input_ids[0] == tok(ALIKE[1]).input_ids[0]
    model = toy.model(seed)
    rows = [toy.row(tok, i, f"which licence {i}" + " is" * i, ALIKE[i % 3], ALIKE) for i in range(5)]
    brute, first_only = [], []
    for row in rows:
        totals = {}
        for choice in ALIKE:
            ids = row["input_ids"][: row["prompt_length"]] + tok(choice).input_ids + [tok.eos_token_id]
            table = alone(model, ids)
            totals[choice] = sum(table[t - 1, ids[t]] for t in range(row["prompt_length"], len(ids)))
        brute.append(max(totals, key=totals.__getitem__))
        first_only.append(max(ALIKE, key=lambda c: table[row["prompt_length"] - 1, tok(c).input_ids[0]]))
    assert [s.choice for s in score_rows(model, tok, rows, batch_size=2)] == brute
    if seed == 0:
        assert brute != first_only  # otherwise this test would prove nothing


def test_a_choice_that_changes_its_tokens_after_the_prompt_is_rendered_by_the_template() -> None:
    tok = toy.tokenizer(toy.SPACED)
    row = toy.row(tok, 0, "is this a licence", "no", ["yes", "no"])
    start = row["prompt_length"]
    found = continuations(tok, row)
    assert found["no"] == row["input_ids"][start:]
    assert found["yes"] == [*tok(" yes").input_ids, tok.eos_token_id] != [*tok("yes").input_ids, tok.eos_token_id]


def test_an_answer_outside_its_choices_is_an_error_and_so_is_a_row_that_no_rendering_gives(tok: Any) -> None:
    with pytest.raises(DataError, match=r"EVAL-003 row row-0.*'no'.*not one of its choices"):
        continuations(tok, toy.row(tok, 0, "is this", "no", ["yes", "maybe"]))
    row = toy.row(tok, 0, "is this", "no", ["yes", "no"])
    row["input_ids"][row["prompt_length"]] += 1
    with pytest.raises(DataError, match="EVAL-003 row row-0: the choices cannot be put"):
        continuations(tok, row)


def test_equal_scores_are_counted_as_ties_and_the_first_choice_is_taken(tok: Any, rows: list[dict[str, Any]]) -> None:
    model = toy.model()
    model.lm_head.weight.data.zero_()
    scores = score_rows(model, tok, rows, batch_size=4)
    assert {(s.choice, s.tied) for s in scores} == {("yes", True)}
    assert scores[0].loss == pytest.approx(math.log(320), abs=1e-5)


def test_a_loss_that_is_not_finite_ends_in_an_error_with_the_row(tok: Any, rows: list[dict[str, Any]]) -> None:
    model = toy.model()
    model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(NumbersError, match=r"EVAL-001.*row-"):
        score_rows(model, tok, rows, batch_size=4)


def test_greedy_text_is_the_argmax_of_full_forwards_and_says_when_it_was_cut(
    tok: Any, rows: list[dict[str, Any]]
) -> None:
    model, prompt = toy.model(), prompt_of(rows[0])
    ids = list(prompt)
    for _ in range(9):
        ids.append(int(alone(model, ids)[-1].argmax()))
    assert 2 not in ids[len(prompt) :]
    assert greedy(model, tok, [prompt], 9) == [tok.decode(ids[len(prompt) :], skip_special_tokens=True).strip() + " …"]
    model.generation_config.eos_token_id = ids[-1]
    first = ids.index(ids[-1], len(prompt))
    assert greedy(model, tok, [prompt], 50) == [tok.decode(ids[len(prompt) : first], skip_special_tokens=True).strip()]


def test_greedy_texts_of_a_batch_are_those_of_each_prompt_alone(tok: Any, rows: list[dict[str, Any]]) -> None:
    model, prompts = toy.model(), [prompt_of(row) for row in rows]
    assert len({len(prompt) for prompt in prompts}) > 3
    ids = list(prompts[3])
    for _ in range(4):
        ids.append(int(alone(model, ids)[-1].argmax()))
    model.generation_config.eos_token_id = ids[-1]  # row 3 ends early, others do not
    each = [greedy(model, tok, [prompt], 12)[0] for prompt in prompts]
    assert greedy(model, tok, prompts, 12) == each == greedy(model, tok, prompts, 12, use_cache=False)
    assert {text.endswith("…") for text in each} == {True, False}


# ---- statistics


def test_mcnemar_is_the_binomial_sum_written_out_by_hand() -> None:
    ours = [True] * 9 + [False] * 2 + [True] * 5 + [False] * 4
    theirs = [False] * 9 + [True] * 2 + [True] * 5 + [False] * 4
    by_hand = 2 * sum(math.comb(11, k) for k in (0, 1, 2)) / 2**11  # two-sided: both tails of Binomial(11, 1/2)
    assert say.mcnemar(ours, theirs) == {
        "test": "McNemar, exact, two-sided, by row", "wins": 9, "losses": 2, "p": pytest.approx(by_hand, rel=1e-12)
    }  # fmt: skip
    assert say.mcnemar([True, False], [True, False])["p"] == 1.0


def test_the_interval_is_wilsons_formula() -> None:
    k, n, z = 17, 24, 1.959963984540054
    share, low, high = say.proportion(k, n, 0.95)
    centre = (k / n + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    assert (share, low, high) == pytest.approx((k / n, centre - half, centre + half), abs=1e-12)
    assert say.proportion(0, 5, 0.95)[1] == pytest.approx(0, abs=1e-12)


def test_by_group_counts_each_group_once() -> None:
    ours = [True, True, True, True, False, False, True, False]
    theirs = [False, False, False, True, True, False, False, True]
    groups = ["a", "a", "a", "b", "b", "c", "d", "d"]  # a: +3, b: -1, c: 0, d: 0
    assert say.by_group(ours, theirs, groups) == {
        "test": "sign test, exact, two-sided, over 4 groups", "wins": 1, "losses": 1, "p": 1.0
    }  # fmt: skip
    assert say.by_group(ours, theirs, list("abcdefgh")) is None


def test_the_loss_change_has_students_interval() -> None:
    base, tuned = [1.0, 2.0, 3.0, 4.0], [0.5, 1.8, 2.9, 3.0]
    change = [-0.5, -0.2, -0.1, -1.0]
    mean = sum(change) / 4
    error = math.sqrt(sum((c - mean) ** 2 for c in change) / 3 / 4)
    told = say.loss_change(base, tuned, 0.95)
    assert told["mean"] == pytest.approx(mean)
    assert (told["low"], told["high"]) == pytest.approx(
        (mean - 3.182446305 * error, mean + 3.182446305 * error), abs=1e-8
    )
    assert say.loss_change([1.0], [0.5], 0.95)["low"] is None
    assert say.loss_change([1.0, 2.0], [0.5, 1.5], 0.95)["p"] is None


def test_the_majority_answer_is_that_of_the_training_rows() -> None:
    assert say.majority_answer(["b", "b", "a"], ["a", "a", "a"]) == "b"
    assert say.majority_answer(["a", "b", "b", "a"], ["b", "b", "a"]) == "b"
    assert say.majority_answer(["b", "a"], ["c"]) == "a"


# ---- the whole comparison


def conclude(
    answers: list[str], base: list[str], tuned: list[str], train: list[str], **settings: Any
) -> dict[str, Any]:
    """scores.json of rows with these answers; the tuned loss is always far lower."""
    choices = sorted({*answers, *base, *tuned, *train})
    rows = [{"row": str(i), "group": f"g{i}", "answer": a, "choices": choices} for i, a in enumerate(answers)]
    score = [
        [SimpleNamespace(loss=loss, logprobs=np.full(2, -loss), choice=c, tied=False) for c in said]
        for loss, said in ((3.0, base), (0.2, tuned))
    ]
    trained = {"answer": train, "choices": [choices] * len(train), "group": ["t"] * len(train)}
    return evaluation.conclude(rows, *score, trained, Evaluate(**settings))  # type: ignore[arg-type]


def test_a_gain_is_claimed_only_against_base_and_majority() -> None:
    truth = ["P"] * 20 + ["C"] * 20
    good = ["P"] * 20 + ["C"] * 17 + ["P"] * 3
    real = conclude(truth, ["X"] * 40, good, ["P"])
    assert real["gain"] is True
    assert real["verdict"] == (
        "On 40 held-out rows from 40 groups it never trained on, the tuned model answers 92 % (80 to 97 %) right, its "
        "base 0 % (0 to 9 %), always answering 'P' 50 % (35 to 65 %). The gain is real by a paired test (p = 1e-11 "
        "against its base, p = 2e-05 against always answering 'P')."
    )
    format_only = conclude(truth, ["X"] * 40, ["P"] * 40, ["P"])
    assert format_only["tuned"]["loss"] < format_only["base"]["loss"]
    assert format_only["tests"]["tuned_vs_base"]["p"] < 0.05
    assert format_only["gain"] is False and "no gain is claimed" in format_only["verdict"]
    worse = conclude(truth, good, ["P"] * 40, ["P"])
    assert worse["gain"] is False and "worse than its base" in worse["verdict"]
    same = conclude(truth, good, good, ["P"])
    assert same["gain"] is False and "difference from its base is not shown" in same["verdict"]


def test_a_gain_that_lives_in_one_group_is_named() -> None:
    rows = [
        {"row": str(i), "group": "one" if i < 30 else "two", "answer": "a", "choices": ["a", "b", "c"]}
        for i in range(40)
    ]
    base = [SimpleNamespace(loss=1.0, logprobs=np.full(1, -1.0), choice="b", tied=False)] * 40
    tuned = [SimpleNamespace(loss=1.0, logprobs=np.full(1, -1.0), choice="a", tied=False)] * 40
    train = {"answer": ["c"], "choices": [["a", "b", "c"]], "group": ["two"]}
    scores = evaluation.conclude(rows, base, tuned, train, Evaluate())  # type: ignore[arg-type]
    assert "Counting each group once it is not shown (p = 0.50)" in scores["verdict"]
    assert "from 2 groups some of which it trained on" in scores["verdict"]


def test_without_choices_a_lower_loss_is_no_gain() -> None:
    rows = [{"row": str(i), "group": "book.txt", "answer": "text", "choices": []} for i in range(9)]
    base, tuned = (
        [SimpleNamespace(loss=m + i / 9, logprobs=np.full(3, -m - i / 9), choice=None, tied=False) for i in range(9)]
        for m in (3.0, 1.0)
    )
    tuned[0] = SimpleNamespace(loss=1.5, logprobs=np.full(3, -1.5), choice=None, tied=False)
    train: dict[str, list[Any]] = {"answer": [], "choices": [], "group": []}
    scores = evaluation.conclude(rows, base, tuned, train, Evaluate(min_gain=0.1))  # type: ignore[arg-type]
    assert scores["verdict"].startswith("On 9 held-out rows, the loss")
    known = evaluation.conclude(rows, base, tuned, train | {"group": ["a", "book.txt"]}, Evaluate())  # type: ignore[arg-type]
    assert known["verdict"].startswith("On 9 held-out rows from a group it trained on, the loss")
    assert scores["gain"] is False and scores["majority"] is None and scores["tuned"]["accuracy"] is None
    assert "fell from 3.444 to 1.500" in scores["verdict"] and "may be format alone" in scores["verdict"]
    (gate,) = scores["gates"]
    assert (gate["gate"], gate["value"], gate["passed"]) == ("evaluate.min_gain", None, False)
    assert gate["why"].startswith("not measurable")


def test_compare_scores_the_base_below_the_adapter(tok: Any, rows: list[dict[str, Any]]) -> None:
    model = toy.adapted()
    heldout, train = Dataset.from_list(rows), Dataset.from_list(rows[:3])
    settings = Evaluate(batch_size=4, samples=3, max_new_tokens=5)
    scores, lines = evaluation.compare(model, tok, train, heldout, settings, seed=1)
    with model.disable_adapter():
        base = score_rows(model, tok, rows, 4)
    fresh = score_rows(toy.model(), tok, rows, 4)  # the same random base, never wrapped
    assert [s.loss for s in base] == pytest.approx([s.loss for s in fresh], abs=1e-6)
    assert scores["base"]["row_loss"] == pytest.approx(np.mean([s.loss for s in fresh]), abs=1e-6)
    assert scores["tuned"]["row_loss"] == pytest.approx(
        np.mean([s.loss for s in score_rows(model, tok, rows, 4)]), abs=1e-6
    )
    assert scores["base"]["loss"] == pytest.approx(-np.concatenate([s.logprobs for s in fresh]).mean(), abs=1e-5)
    assert scores["base"]["loss"] != scores["tuned"]["loss"]
    assert scores["base"]["correct"] == sum(s.choice == r["answer"] for s, r in zip(fresh, rows, strict=True))
    assert scores["adapter_effect"]["largest_nats"] > 0
    assert [line["base"]["loss"] for line in lines] == pytest.approx([s.loss for s in fresh], abs=1e-6)
    assert sum(line["tuned"]["right"] for line in lines) == scores["tuned"]["correct"]
    assert [line["tuned"]["mark"] for line in lines] == [float(line["tuned"]["right"]) for line in lines]
    assert len(scores["samples"]) == 3 and all(
        set(s) == {"row", "question", "expected", "base", "tuned"} for s in scores["samples"]
    )
    drawn = {s["row"]: s for s in scores["samples"]}
    one = next(r for r in rows if r["row"] in drawn)
    assert drawn[one["row"]]["base"] == greedy(toy.model(), tok, [prompt_of(one)], 5)[0]
    assert drawn[one["row"]]["tuned"] == greedy(model, tok, [prompt_of(one)], 5)[0]


def test_fewer_rows_are_drawn_by_the_seed(tok: Any, rows: list[dict[str, Any]]) -> None:
    data = Dataset.from_list(rows)
    kept = [[r["row"] for r in evaluation._drawn(data, 5, seed)] for seed in (1, 1, 2)]
    assert kept[0] == kept[1] != kept[2] and len(set(kept[0])) == 5
    assert [r["row"] for r in evaluation._drawn(data, 0, 1)] == [r["row"] for r in rows]


def test_an_adapter_that_changes_nothing_is_an_error(tok: Any, rows: list[dict[str, Any]]) -> None:
    data = Dataset.from_list(rows)
    with pytest.raises(NumbersError, match="EVAL-002 the adapter changes nothing"):
        evaluation.compare(toy.adapted(trained=False), tok, data, data, Evaluate(samples=0), seed=1)


def test_no_held_out_rows_is_an_error(tok: Any, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="EVAL-005"):
        evaluation.compare(toy.adapted(), tok, Dataset.from_list(rows), [], Evaluate(), seed=1)


def stage(monkeypatch: pytest.MonkeyPatch, tok: Any, rows: list[dict[str, Any]], recipe: Recipe, folder: Path) -> None:
    """The rooms below `evaluate`, replaced by the toy model; `folder` stands for its base's."""
    data, base = (
        Dataset.from_list(rows),
        SimpleNamespace(
            tokenizer=tok, family=SimpleNamespace(routing_table="mlp.table"), arithmetic=contextlib.nullcontext
        ),
    )
    for name, what in {
        "whole.load_trained": lambda _base, _folder: toy.adapted(),
        "base.load_base": lambda _folder, *, load_in_4bit, precision, double_quantisation: base,
        "compose.read_recipe": lambda _path: recipe,
        "data.load_splits": lambda _run: SimpleNamespace(train=data, heldout=data),
        "source.base_folder": lambda _recipe: folder,
    }.items():
        monkeypatch.setattr(f"finetune.{name}", what)


def test_a_gate_that_is_not_met_leaves_the_scores_and_ends_with_exit_code_4(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, tok: Any, rows: list[dict[str, Any]]
) -> None:
    recipe = Recipe(evaluate=Evaluate(min_gain=0.99, samples=1, max_new_tokens=3))
    stage(monkeypatch, tok, rows, recipe, tmp_path)
    run_dir = RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    with pytest.raises(RunError, match="data run="):
        evaluation.evaluate(run_dir)
    run_dir.data.mkdir()
    (run_dir.data / "report.json").write_text("{}")
    with pytest.raises(RunError, match="train run="):
        evaluation.evaluate(run_dir)
    run_dir.adapter.mkdir()
    with pytest.raises(GateError, match=r"EVAL-004 evaluate.min_gain=0.99 is not met") as error:
        evaluation.evaluate(run_dir)
    assert error.value.exit_code == 4
    scores = read_json(run_dir.scores)
    assert scores["gates"][0]["passed"] is False and {
        "base",
        "tuned",
        "majority",
        "tests",
        "verdict",
        "samples",
    } <= set(scores)
    assert len(read_lines(run_dir.scores_rows)) == len(rows) == scores["rows"] and not run_dir.scoring.exists()
    recipe.evaluate.min_gain = -0.99
    evaluation.evaluate(run_dir)
    assert read_json(run_dir.scores)["gates"][0]["passed"] is True


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tok: Any, rows: list[dict[str, Any]]) -> SimpleNamespace:
    """A run whose recipe has two tasks, of which the second has failed once: `run_dir`, `recipe`.

    `asked` is what the models were asked for since, in order; `forwards` has for each of their forward passes what it
    was for.
    """
    lines = [json.dumps({"q": f"Is {i} even?", "a": "yes" if i % 2 else "no"}) for i in range(4)]
    (tmp_path / "tasks").mkdir()
    for name in ("one", "two"):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name))
        (tmp_path / "tasks" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    settings = Evaluate(
        samples=1, max_new_tokens=3, drift=True, drift_prompts=1, drift_seeds=0, drift_new_tokens=2,
        tasks=["one", "two"], tasks_folder=str(tmp_path / "tasks"),
    )  # fmt: skip
    recipe = Recipe(evaluate=settings, cache_dir=str(tmp_path / "cache"))
    recipe.data.sample = True
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    stage(monkeypatch, tok, rows, recipe, tmp_path / "base")
    run_dir = RunDir(tmp_path / "run")
    run_dir.adapter.mkdir(parents=True)
    (run_dir.adapter / "adapter.safetensors").write_text("as it was")
    run_dir.data.mkdir()
    (run_dir.data / "report.json").write_text("{}")
    asked: list[str] = []
    forwards: list[str] = []

    def load_trained(_base: Any, _folder: Path) -> Any:
        model = toy.adapted()
        model.get_base_model().register_forward_hook(lambda *_: forwards.append(asked[-1]))
        return model

    monkeypatch.setattr("finetune.whole.load_trained", load_trained)
    real_scores, real_drift, real_take = scoring.score_rows, drift.drift, harness.take

    def count_scores(*given: Any, **named: Any) -> Any:
        asked.append("scored")
        return real_scores(*given, **named)

    def count_drift(*given: Any, **named: Any) -> Any:
        asked.append("drift")
        return real_drift(*given, **named)

    def take_or_fail(taker: Any, name: str, *given: Any) -> Any:
        asked.append(f"task {name}")
        if name == "two" and asked.count("task two") == 1:
            raise DataError("TSK-010", "the harness cannot run the task two", "as this test wants it", "")
        return real_take(taker, name, *given)

    monkeypatch.setattr(scoring, "score_rows", count_scores)
    monkeypatch.setattr(drift, "drift", count_drift)
    monkeypatch.setattr(harness, "take", take_or_fail)
    with pytest.raises(DataError, match="TSK-010"):
        evaluation.evaluate(run_dir)
    assert asked == ["scored", "scored", "drift", "task one", "task one", "task two"]
    assert not run_dir.scores.exists() and not run_dir.scores_rows.exists()
    assert set(forwards) == {"scored", "drift", "task one"} and forwards.count("scored") > 3
    asked[:], forwards[:] = ["task two"], []  # it fails no more
    return SimpleNamespace(run_dir=run_dir, recipe=recipe, asked=asked, forwards=forwards)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{{{a}}}}"
"""


def test_what_was_measured_before_a_task_failed_is_not_measured_again(
    failing: SimpleNamespace,
) -> None:
    run_dir, asked = failing.run_dir, failing.asked
    evaluation.evaluate(run_dir)
    assert asked == ["task two"] * 3 and set(failing.forwards) == {"task two"}
    went_on = run_dir.scores.read_bytes(), run_dir.scores_rows.read_bytes()
    assert {one["task"] for one in read_json(run_dir.scores)["tasks"]["sets"]} == {"one", "two"}
    assert not run_dir.scoring.exists()
    run_dir.scores.unlink()
    evaluation.evaluate(run_dir)
    assert asked[3:] == ["scored", "scored", "drift", "task one", "task one", "task two", "task two"]
    assert (run_dir.scores.read_bytes(), run_dir.scores_rows.read_bytes()) == went_on  # as if nothing had happened


def _of(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda run, recipe: _of(run.adapter / "adapter.safetensors", "another"), "scored scored drift one one"),
        (lambda run, recipe: _of(run.path.parent / "base" / "config.json", "{ }"), "scored scored drift one one"),
        (lambda run, recipe: _of(run.data / "report.json", "{ }"), "scored scored drift one one"),
        (lambda run, recipe: setattr(recipe, "seed", 18), "scored scored drift one one"),
        (lambda run, recipe: _of(run.scoring / "heldout.json", "{"), "scored scored"),
        (
            lambda run, recipe: _of(
                run.scoring / "heldout.json",
                (run.scoring / "heldout.json").read_text().replace('"rows": 11', '"rows": 12'),
            ),
            "scored scored",
        ),
        (lambda run, recipe: _of(run.path.parent / "tasks" / "one.jsonl", '{"q": "Is it?", "a": "no"}\n'), "one one"),
        (lambda run, recipe: shutil.rmtree(run.scoring), "scored scored drift one one"),
    ],
    ids=["adapter", "base", "rows", "seed", "cut", "changed", "task", "gone"],
)
def test_what_was_measured_of_something_else_is_measured_again(
    failing: SimpleNamespace, change: Any, again: str
) -> None:
    change(failing.run_dir, failing.recipe)
    evaluation.evaluate(failing.run_dir)
    told = [f"task {word}" if word == "one" else word for word in again.split()]
    assert failing.asked[1:] == [*told, "task two", "task two"]


def test_unfinished_parts_are_no_output_of_the_run_and_are_swept_where_they_were_left(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.scoring.mkdir()
    for path in (run_dir.scoring / "heldout.json", run_dir.scores_rows):
        path.write_text("{}")
    assert output_names(run_dir) == ["scores_rows.jsonl"]
    run_dir.sweep()
    assert run_dir.scoring.exists()
    run_dir.scores.write_text("{}")
    run_dir.sweep()
    assert not run_dir.scoring.exists()
