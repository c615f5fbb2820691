"""Base against tuned on the same rows and prompts: what was gained, what was forgotten, what drifted, and the gates."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import DataError, NumbersError
from finetune.evaluate import metric
from finetune.evaluate.conclude import conclude, marks_of
from finetune.evaluate.gates import gates, require_gates
from finetune.evaluate.kept import Kept, identity, measured
from finetune.evaluate.rows import lines_of, write_lines
from finetune.evaluate.table import show
from finetune.rundir import RunDir, write_json

if TYPE_CHECKING:
    from finetune.evaluate.score import Row, RowScore
    from finetune.recipe import Evaluate, Recipe


def evaluate(run_dir: RunDir) -> None:
    """`scores.json` in the run folder: base and tuned side by side, with the gates' verdicts; `scores_rows.jsonl`.

    What was measured before one of its parts failed is kept, and not measured again. Raises RunError when the run has
    no adapter, or other rows than were prepared (RUN-011), NumbersError when a loss is not finite or the adapter
    changes nothing, and GateError EVAL-004 when a gate of the recipe is not met; the scores are written before that.
    """
    from finetune.base import load_base
    from finetune.compose import read_recipe
    from finetune.data import load_splits, require_rows
    from finetune.source import base_folder
    from finetune.whole import load_trained

    recipe = read_recipe(run_dir.recipe)
    require_rows(run_dir, recipe)
    run_dir.require(run_dir.trained, "train")
    splits, folder = load_splits(run_dir), base_folder(recipe)
    base = load_base(
        folder,
        load_in_4bit=recipe.adapter.load_in_4bit,
        precision=recipe.train.precision,
        double_quantisation=recipe.adapter.double_quantisation,
    )
    model = load_trained(base, run_dir.trained)
    cache = not base.family.routing_table  # a router that looks tokens up needs all of them in every step
    kept = Kept(run_dir.scoring, identity(recipe, run_dir, folder))

    def heldout() -> dict[str, Any]:
        scores, lines = compare(
            model, base.tokenizer, splits.train, splits.heldout, recipe.evaluate, recipe.seed, use_cache=cache
        )
        return {"scores": scores, "rows": lines}

    with base.arithmetic():
        compared = kept.part("heldout", heldout)
        scores = compared["scores"]
        scores |= what_it_broke(model, base.tokenizer, recipe, folder, use_cache=cache, keep=kept.part)
        scores["tasks"] = None
        if recipe.evaluate.tasks:
            from finetune.evaluate.tasks import take_tasks

            scores["tasks"] = take_tasks(model, base.tokenizer, recipe, splits.train, use_cache=cache, keep=kept.part)
    scores["gates"] = gates(scores, recipe.evaluate)
    write_lines(run_dir.scores_rows, compared["rows"])
    write_json(run_dir.scores, scores)  # last: it means that the evaluation is whole
    kept.end()
    show(scores)
    if scores["tasks"] is not None:
        from finetune.evaluate.tasks import show as show_tasks

        show_tasks(scores["tasks"])
    require_gates(scores)


def what_it_broke(
    model: Any, tokenizer: Any, recipe: Recipe, folder: Path, *, use_cache: bool = True, keep: Any = measured
) -> dict[str, Any]:
    """`forgetting` and `safety` of scores.json, each None where the recipe asks for nothing; `folder` is the base's.

    `keep(name, make, of)` gives what `make` does, or what it gave before of the same.
    """
    settings = recipe.evaluate
    found: dict[str, Any] = {"forgetting": None, "safety": None}
    was_training = model.training
    model.eval()
    try:
        if settings.general:
            from finetune.data.general import general_rows
            from finetune.evaluate.forgetting import forgetting

            sets = general_rows(recipe, folder)
            asked = [[each.name, [[row["input_ids"], row["choices"]] for row in each.rows]] for each in sets]
            ask = partial(forgetting, model, tokenizer, sets, settings, recipe.seed)
            found["forgetting"] = keep("forgetting", ask, asked)
        if settings.drift:
            from finetune.data.prompts import own_prompts
            from finetune.evaluate.drift import chosen, drift

            prompts = chosen(own_prompts(recipe), settings, recipe.seed)
            ask = partial(drift, model, tokenizer, prompts, settings, recipe.seed, use_cache)
            found["safety"] = keep("safety", ask, [[prompt.kind, prompt.text] for prompt in prompts])
    finally:
        model.train(was_training)
    return found


def compare(
    model: Any, tokenizer: Any, train: Any, heldout: Any, settings: Evaluate, seed: int, *, use_cache: bool = True
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What scores.json says of the held-out rows, and a line for each of them as `scores_rows.jsonl` has it.

    `model` is a PEFT model; with its adapter disabled it is its base.

    `train` and `heldout` are datasets with the columns of `load_splits`; of `train` only `answer`, `choices` and
    `group` are read. Held-out rows and samples are drawn by `seed` when fewer than all are used.
    """
    from finetune.evaluate.score import progress, score_rows

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
        before, after = _answers(model, tokenizer, shown, settings, use_cache)
        marks = _marks(model, tokenizer, rows, settings, seed, use_cache) if metric.reads_answers(settings) else None
    finally:
        model.train(was_training)
    samples = [
        {"row": row["row"], "question": _question(row), "expected": row["answer"], "base": old, "tuned": new}
        for row, old, new in zip(shown, before, after, strict=True)
    ]
    marks = marks_of(rows, base, tuned, settings, marks)
    scores = conclude(rows, base, tuned, train, settings, seed=seed, answered=marks)
    return scores | {"adapter_effect": effect, "samples": samples}, lines_of(rows, base, tuned, marks)


def _marks(
    model: Any, tokenizer: Any, rows: Sequence[Row], settings: Evaluate, seed: int, use_cache: bool
) -> metric.Marks:
    """The metric of generated answers, on `metric_rows` of the rows."""
    places = _drawn(range(len(rows)), settings.metric_rows, seed)
    asked = [rows[i] for i in places]
    base, tuned = _answers(model, tokenizer, asked, settings, use_cache)
    return metric.by_answer(settings.metric, places, [row["answer"] for row in asked], base, tuned)


def _answers(
    model: Any, tokenizer: Any, rows: Sequence[Row], settings: Evaluate, use_cache: bool
) -> tuple[list[str], list[str]]:
    """Greedy answers of base and tuned to the rows' prompts."""
    from finetune.evaluate.score import greedy, prompt_of

    before: list[str] = []
    after: list[str] = []
    for begin in range(0, len(rows), settings.batch_size):
        prompts = [prompt_of(row) for row in rows[begin : begin + settings.batch_size]]
        with model.disable_adapter():
            before += greedy(model, tokenizer, prompts, settings.max_new_tokens, use_cache)
        after += greedy(model, tokenizer, prompts, settings.max_new_tokens, use_cache)
    return before, after


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


def _drawn(rows: Sequence[Any], number: int, seed: int) -> list[Any]:
    """`number` rows drawn by `seed`, in their own order; all rows when `number` is 0 or more than there are."""
    if not 0 < number < len(rows):
        return list(rows)
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), number))]


def _question(row: Row) -> str:
    """The last message before the answer."""
    return row["messages"][-2]["content"] if len(row["messages"]) > 1 else ""
