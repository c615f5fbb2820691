"""Base against tuned on the same held-out rows: loss, right answers with intervals, paired tests, samples, gates."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune.errors import DataError, GateError, NumbersError
from finetune.rundir import RunDir, write_json

if TYPE_CHECKING:
    from finetune.evaluate.score import Row, RowScore
    from finetune.recipe import Evaluate


def evaluate(run_dir: RunDir) -> None:
    """`scores.json` in the run folder: base and tuned side by side, with the gates' verdicts.

    Raises RunError when the run has no adapter, NumbersError when a loss is not finite or the adapter changes nothing,
    and GateError EVAL-004 when a gate of the recipe is not met; the scores are written before that.
    """
    from finetune.base import load_base
    from finetune.compose import read_recipe
    from finetune.data import load_splits
    from finetune.source import base_folder
    from finetune.whole import load_trained

    recipe = read_recipe(run_dir.recipe)
    run_dir.require(run_dir.data / "report.json", "data")
    run_dir.require(run_dir.trained, "train")
    splits = load_splits(run_dir)
    base = load_base(
        base_folder(recipe),
        load_in_4bit=recipe.adapter.load_in_4bit,
        precision=recipe.train.precision,
        double_quantisation=recipe.adapter.double_quantisation,
    )
    model = load_trained(base, run_dir.trained)
    cache = not base.family.routing_table  # a router that looks tokens up needs all of them in every step
    with base.arithmetic():
        scores = compare(
            model, base.tokenizer, splits.train, splits.heldout, recipe.evaluate, recipe.seed, use_cache=cache
        )
        scores["tasks"] = None
        if recipe.evaluate.tasks:
            from finetune.evaluate.tasks import take_tasks

            scores["tasks"] = take_tasks(model, base.tokenizer, recipe, splits.train, use_cache=cache)
    write_json(run_dir.scores, scores)
    show(scores)
    if scores["tasks"] is not None:
        from finetune.evaluate.tasks import show as show_tasks

        show_tasks(scores["tasks"])
    require_gates(scores)


def compare(
    model: Any, tokenizer: Any, train: Any, heldout: Any, settings: Evaluate, seed: int, *, use_cache: bool = True
) -> dict[str, Any]:
    """The content of scores.json. `model` is a PEFT model; its base is the same model with the adapter disabled.

    `train` and `heldout` are datasets with the columns of `load_splits`; of `train` only `answer`, `choices` and
    `group` are read. Held-out rows and samples are drawn by `seed` when fewer than all are used.
    """
    from finetune.evaluate.score import greedy, progress, prompt_of, score_rows

    rows = _drawn(heldout, settings.rows, seed)
    if not rows:
        raise DataError(
            "EVAL-005", "there are no held-out rows", "the data stage kept none", "data.heldout_fraction=0.1"
        )
    shown = _drawn(rows, settings.samples, seed) if settings.samples else []
    was_training = model.training
    model.eval()
    try:
        with progress(len(rows), "base") as advance, model.disable_adapter():
            base = score_rows(model, tokenizer, rows, settings.batch_size, advance)
        with progress(len(rows), "tuned") as advance:
            tuned = score_rows(model, tokenizer, rows, settings.batch_size, advance)
        effect = adapter_effect(base, tuned)
        before, after = [], []
        for begin in range(0, len(shown), settings.batch_size):
            prompts = [prompt_of(row) for row in shown[begin : begin + settings.batch_size]]
            with model.disable_adapter():
                before += greedy(model, tokenizer, prompts, settings.max_new_tokens, use_cache)
            after += greedy(model, tokenizer, prompts, settings.max_new_tokens, use_cache)
    finally:
        model.train(was_training)
    samples = [
        {"row": row["row"], "question": _question(row), "expected": row["answer"], "base": old, "tuned": new}
        for row, old, new in zip(shown, before, after, strict=True)
    ]
    return conclude(rows, base, tuned, train, settings) | {"adapter_effect": effect, "samples": samples}


def conclude(
    rows: Sequence[Row], base: Sequence[RowScore], tuned: Sequence[RowScore], train: Any, settings: Evaluate
) -> dict[str, Any]:
    """Everything in scores.json that follows from the rows' scores: shares, intervals, tests, verdict, gates."""
    from finetune.evaluate import verdict as say

    level = settings.confidence
    asked = [i for i, row in enumerate(rows) if row["choices"]]
    groups, trained = {row["group"] for row in rows}, set(train["group"])
    scores: dict[str, Any] = {
        "rows": len(rows),
        "rows_with_choices": len(asked),
        "groups": len(groups) if len(groups) > 1 else None,
        "groups_trained_on": len(groups & trained),
        "confidence": level,
        "base": _side(rows, base, asked, level),
        "tuned": _side(rows, tuned, asked, level),
        "majority": None,
        "by_answer": [],
        "tests": dict.fromkeys(
            ("tuned_vs_base", "tuned_vs_majority", "tuned_vs_base_by_group", "tuned_vs_majority_by_group")
        ),
    }
    scores["tests"]["loss"] = say.loss_change([s.loss for s in base], [s.loss for s in tuned], level)
    if asked:
        right = [rows[i]["answer"] for i in asked]
        trained_answers = [a for a, choices in zip(train["answer"], train["choices"], strict=True) if choices]
        usual = say.majority_answer(trained_answers, right)
        by_base = [base[i].choice == rows[i]["answer"] for i in asked]
        by_tuned = [tuned[i].choice == rows[i]["answer"] for i in asked]
        by_usual = [answer == usual for answer in right]
        share, low, high = say.proportion(sum(by_usual), len(asked), level)
        scores["majority"] = {"answer": usual, "accuracy": share, "correct": sum(by_usual), "low": low, "high": high}
        of_group = [rows[i]["group"] for i in asked]
        for name, other in (("tuned_vs_base", by_base), ("tuned_vs_majority", by_usual)):
            scores["tests"][name] = say.mcnemar(by_tuned, other)
            scores["tests"][f"{name}_by_group"] = say.by_group(by_tuned, other, of_group)
        scores["by_answer"] = _by_answer(right, [base[i].choice for i in asked], [tuned[i].choice for i in asked])
    scores["gain"] = say.is_gain(scores)
    scores["verdict"] = say.verdict(scores)
    scores["gates"] = gates(scores, settings)
    return scores


def gates(scores: dict[str, Any], settings: Evaluate) -> list[dict[str, Any]]:
    """One entry per gate that the recipe sets. A gate that cannot be measured is not passed."""
    if settings.min_gain <= -1:
        return []
    asked = scores["majority"] is not None
    value = scores["tuned"]["accuracy"] - scores["base"]["accuracy"] if asked else None
    passed = value is not None and value >= settings.min_gain
    return [{"gate": "evaluate.min_gain", "limit": settings.min_gain, "value": value, "passed": passed}]


def require_gates(scores: dict[str, Any]) -> None:
    """Raises GateError EVAL-004 when a gate is not passed."""
    for gate in scores["gates"]:
        if not gate["passed"]:
            value = "not measurable, the rows have no choices" if gate["value"] is None else f"{gate['value']:.3f}"
            raise GateError(
                "EVAL-004", f"{gate['gate']}={gate['limit']:g} is not met", f"it is {value}; scores.json is written"
            )


def adapter_effect(base: Sequence[RowScore], tuned: Sequence[RowScore]) -> dict[str, float]:
    """Largest and mean change of an answer token's log-probability, in nats. Raises EVAL-002 when there is none."""
    import numpy as np

    change = np.concatenate([np.abs(b.logprobs - t.logprobs) for b, t in zip(base, tuned, strict=True)])
    if not change.any():
        raise NumbersError(
            "EVAL-002",
            "the adapter changes nothing",
            f"base and tuned give the same numbers on all {len(change)} answer tokens",
            "more train.max_steps or a higher train.lr, and look at the coverage table in train.json",
        )
    return {"largest_nats": float(change.max()), "mean_nats": float(change.mean(dtype=np.float64))}


def show(scores: dict[str, Any]) -> None:
    """Prints the table and the verdict."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "loss", "right", "interval", title=f"{scores['rows']} held-out rows")
    for name in ("base", "tuned", "majority"):
        side = scores[name]
        if side is None:
            continue
        asked = side["accuracy"] is not None
        table.add_row(
            name if name != "majority" else f"always '{side['answer']}'",
            f"{side['loss']:.3f}" if "loss" in side else "",
            f"{100 * side['accuracy']:.1f} %" if asked else "",
            f"{100 * side['low']:.1f} to {100 * side['high']:.1f} %" if asked else "",
        )
    console = Console()
    console.print(table)
    console.print(scores["verdict"], markup=False, highlight=False)


def _side(rows: Sequence[Row], scored: Sequence[RowScore], asked: Sequence[int], level: float) -> dict[str, Any]:
    from finetune.evaluate.verdict import proportion

    tokens = sum(len(s.logprobs) for s in scored)
    total = sum(s.loss * len(s.logprobs) for s in scored)
    side: dict[str, Any] = {
        "loss": total / tokens,
        "row_loss": sum(s.loss for s in scored) / len(scored),
        "tokens": tokens,
        "accuracy": None,
        "correct": None,
        "low": None,
        "high": None,
        "ties": None,
    }
    if asked:
        correct = sum(scored[i].choice == rows[i]["answer"] for i in asked)
        share, low, high = proportion(correct, len(asked), level)
        side |= {"accuracy": share, "correct": correct, "low": low, "high": high}
        side["ties"] = sum(scored[i].tied for i in asked)
    return side


def _by_answer(right: Sequence[str], base: Sequence[Any], tuned: Sequence[Any]) -> list[dict[str, Any]]:
    """Per answer: how often it is right, is said, and is said rightly. Shows a model that says one thing only."""
    expected, said_base, said_tuned = Counter(right), Counter(base), Counter(tuned)
    hits_base = Counter(r for r, b in zip(right, base, strict=True) if r == b)
    hits_tuned = Counter(r for r, t in zip(right, tuned, strict=True) if r == t)
    names = sorted(expected | said_base | said_tuned, key=lambda a: (-expected[a], a))
    return [
        {
            "answer": a,
            "rows": expected[a],
            "base_said": said_base[a],
            "base_right": hits_base[a],
            "tuned_said": said_tuned[a],
            "tuned_right": hits_tuned[a],
        }
        for a in names
    ]


def _drawn(rows: Sequence[Row], number: int, seed: int) -> list[Row]:
    """`number` rows drawn by `seed`, in their own order; all rows when `number` is 0 or more than there are."""
    if not 0 < number < len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), number))]


def _question(row: Row) -> str:
    """The last message before the answer."""
    return row["messages"][-2]["content"] if len(row["messages"]) > 1 else ""
