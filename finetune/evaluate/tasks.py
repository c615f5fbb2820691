"""Benchmarks before and after: base and tuned take the same rows of the same tasks. `take_tasks(...)`, `show(...)`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune import tasks as known
from finetune.data.items import Item
from finetune.errors import DataError
from finetune.evaluate.card_rows import card_file
from finetune.evaluate.kept import measured
from finetune.evaluate.overlap import found_in, texts_of
from finetune.evaluate.paired import paired
from finetune.evaluate.sandbox import run_code, sandbox_problem
from finetune.evaluate.score import progress
from finetune.fetch import cache_folder
from finetune.recipe import Evaluate, Recipe
from finetune.rundir import sha256_file

SLICES = ("subject", "category", "subcategory", "domain", "level", "type")
"""Columns that a task's rows are told apart by, the first that has from 2 to MOST values."""
MOST = 60
"""Values of such a column at most."""
INDEX = "training rows of this run"
"""What rows of tasks are looked for in."""


def take_tasks(
    model: Any, tokenizer: Any, recipe: Recipe, train: Any, *, use_cache: bool = True, keep: Any = measured
) -> dict[str, Any]:
    """What scores.json says under `tasks`: the harness's version and a set for every task of `evaluate.tasks`.

    `model.disable_adapter()` is the context in which the model is its base; `train` are the run's training rows. A
    group whose members have one metric is one set, with a slice for each member; otherwise each member is a set.
    `keep(name, make, of)` gives what `make` does, or what it gave before of the same: each task is kept by itself.
    Raises DataError TSK-003, TSK-010 for tasks that cannot be run, RunError TSK-009 where code cannot be confined.
    """
    from finetune.evaluate.harness import Settings, Taker, load

    asked = recipe.evaluate
    wanted = [_found(name, asked.tasks_folder) for name in asked.tasks]
    if any(leaf.runs_code for task in wanted for leaf in task.leaves):
        _may_run_code(recipe)
    settings = Settings(asked.few_shot, asked.task_chat, recipe.seed, asked.task_rows)
    taker = Taker(model, tokenizer, asked.batch_size, use_cache)
    texts = partial(texts_of, train, tokenizer)
    sets: list[dict[str, Any]] = []
    for number, task in enumerate(wanted, 1):
        files = {leaf.name: card_file(leaf, recipe) for leaf in task.leaves if leaf.said("card")}
        loaded = load(task, asked.tasks_folder, cache_folder(recipe) / "tasks" / "unpacked", files)
        drawn = _drawn({name: len(one.eval_docs) for name, one in loaded.items()}, asked.task_rows, recipe.seed)
        print(f"task {number} of {len(wanted)}: {task.name}, {sum(map(len, drawn.values()))} rows", flush=True)
        answers = partial(_answers, model, taker, task.name, loaded, drawn, settings)
        make = partial(_taken, task, loaded, answers, texts, asked)
        sets += keep(f"task-{number}", make, _content(task, asked.tasks_folder, files))
    return {"harness": metadata.version(known.HARNESS), "sets": sets}


def _answers(
    model: Any, taker: Any, name: str, loaded: dict[str, Any], drawn: dict[str, list[int]], settings: Any
) -> tuple[list[Any], list[Any], int]:
    """What base and tuned make of the drawn rows, and how many of base's prompts were cut."""
    from finetune.evaluate.harness import take

    taker.cut = 0
    with model.disable_adapter():
        base = take(taker, name, loaded, drawn, settings)
    cut = taker.cut
    return base, take(taker, name, loaded, drawn, settings), cut


def _taken(
    task: known.Task,
    loaded: dict[str, Any],
    answers: Callable[[], tuple[list[Any], list[Any], int]],
    texts: Callable[[], Iterable[str]],
    asked: Evaluate,
) -> list[dict[str, Any]]:
    """The sets of one task; `texts` gives the training rows' words."""
    before, after, cut = answers()
    leaves = {leaf.name: leaf for leaf in task.leaves}
    sets = []
    for name, members in _sets(task.name, before):
        base, tuned = ([answer for answer in side if answer.leaf in members] for side in (before, after))
        made = _set(name, base, tuned, loaded, leaves, asked.confidence)
        made["contaminated"] = _contaminated(made, base, loaded, leaves, texts(), asked.confidence)
        sets.append(_told(made) | {"cut_prompts": cut, "chat": asked.task_chat})
    return sets


def _content(task: known.Task, folder: str, files: dict[str, Path]) -> dict[str, Any]:
    """What a task is made of: the harness, its settings, and the hashes of its rows' files. `files` are of cards."""
    found: dict[str, Any] = {"harness": metadata.version(known.HARNESS)}
    for leaf in task.leaves:
        paths = [files[leaf.name]] if leaf.name in files else known.data_files(leaf, folder)
        found[leaf.name] = [leaf.config, leaf.changes, [sha256_file(path) for path in paths]]
    return found


def show(told: dict[str, Any] | None) -> None:
    """Prints the table of tasks; nothing where none was taken."""
    from rich.console import Console
    from rich.table import Table

    if told is None:
        return
    table = Table("task", "metric", "rows", "base", "tuned", "difference", "p", title="benchmarks")
    for one in told["sets"]:
        p = one["test"]["p"] if one["test"] else None
        table.add_row(
            one["task"],
            one["metric"],
            str(one["rows"]),
            *(_interval(one[side], "value") for side in ("base", "tuned")),
            _interval(one["difference"], "mean", "+"),
            "" if p is None else f"{p:.2g}",
        )
        for part in one["slices"]:
            values = [_interval(part[side], "value") for side in ("base", "tuned")]
            table.add_row(
                f"  {part['name']}", "", str(part["rows"]), *values, _interval(part["difference"], "mean", "+")
            )
        if one["contaminated"]:
            hit = one["contaminated"]
            for word, count in (("without", one["rows"] - hit["rows"]), ("alone", hit["rows"])):
                part = hit["clean" if word == "without" else "hit"]
                values = [_interval(part[side], "value") if part[side] else "" for side in ("base", "tuned")]
                table.add_row(f"  rows seen in training, {word}", "", str(count), *values, "", "")
    console = Console()
    console.print(table)
    for one in told["sets"]:
        if one["cut_prompts"]:
            console.print(f"{one['task']}: up to {one['cut_prompts']} prompts may be cut to what the base can read.")


def _found(name: str, folder: str) -> known.Task:
    try:
        return known.find(name, folder)
    except LookupError as error:
        code, _, what = str(error.args[0]).partition(" ")
        raise DataError(code, what) from None


def _may_run_code(recipe: Recipe) -> None:
    """Nothing, or the error that says why no code is run; before an hour of generating it."""
    if not recipe.evaluate.allow_code:
        raise DataError("TSK-005", "a task runs code that the models write", "", "evaluate.allow_code=true")
    if why := sandbox_problem():
        raise DataError("TSK-009", "generated code cannot be confined on this machine", why, "a task without code")


def _drawn(sizes: dict[str, int], rows: int, seed: int) -> dict[str, list[int]]:
    """Leaf -> numbers of its rows that are asked, `rows` of all of them drawn by `seed`; all when `rows` is 0."""
    every = [(leaf, row) for leaf, size in sizes.items() for row in range(size)]
    if 0 < rows < len(every):
        every = [every[i] for i in sorted(random.Random(seed).sample(range(len(every)), rows))]
    return {leaf: [row for owner, row in every if owner == leaf] for leaf in sizes}


def _sets(name: str, answers: Sequence[Any]) -> list[tuple[str, set[str]]]:
    """(name, leaves) of every set: all leaves together where they share a metric, else each alone."""
    metric_of = {answer.leaf: answer.metric for answer in answers}
    if len(set(metric_of.values())) == 1:
        return [(name, set(metric_of))]
    return [(leaf, {leaf}) for leaf in metric_of]


def _set(
    name: str,
    base: Sequence[Any],
    tuned: Sequence[Any],
    loaded: dict[str, Any],
    leaves: dict[str, known.Leaf],
    confidence: float,
) -> dict[str, Any]:
    """Scores of one set, with the values of its rows under `_values` for what follows."""
    from finetune.evaluate.harness import is_mean

    assert [(a.leaf, a.row, a.prompt) for a in base] == [(a.leaf, a.row, a.prompt) for a in tuned]
    leaf, task = leaves[base[0].leaf], loaded[base[0].leaf]
    metric = base[0].metric
    if leaf.runs_code:
        metric = "pass@1"
        values = _passed(name, base), _passed(name, tuned)
    else:
        values = [a.value for a in base], [a.value for a in tuned]
    plain = all(isinstance(value, int | float) for side in values for value in side)
    by_row = leaf.runs_code or (plain and is_mean(task, metric.partition(",")[0]))
    made: dict[str, Any] = {
        "task": name,
        "metric": metric,
        "rows": len(base),
        "few_shot": task.get_config("num_fewshot") or 0,
        "higher_is_better": True if leaf.runs_code else task.higher_is_better()[metric.partition(",")[0]],
    }
    if by_row:
        made |= paired(*_numbers(values), confidence)
    else:
        made |= _whole(task, metric.partition(",")[0], *values)
    made["_values"] = values if by_row else None
    made["slices"] = _slices(made, base, leaf, confidence)
    return made


def _numbers(values: tuple[Sequence[Any], Sequence[Any]]) -> tuple[list[float], list[float]]:
    """The values of both sides as plain numbers."""
    return [float(value) for value in values[0]], [float(value) for value in values[1]]


def _whole(task: Any, metric: str, base: Sequence[Any], tuned: Sequence[Any]) -> dict[str, Any]:
    """Scores of a metric that is no mean of rows: without intervals, which its rows do not give."""
    from finetune.evaluate.harness import aggregate

    before, after = aggregate(task, metric, base), aggregate(task, metric, tuned)
    return {
        "base": {"value": before, "low": None, "high": None},
        "tuned": {"value": after, "low": None, "high": None},
        "difference": {"mean": after - before, "low": None, "high": None},
        "test": None,
        "interval": "none: the metric is no mean of rows",
    }


def _passed(name: str, answers: Sequence[Any]) -> list[int]:
    """1 for every answer whose program passes the tests of its row, else 0."""
    done: dict[str, int] = {}
    values = []
    with progress(len(answers), f"{name}: running what was written") as advance:
        for answer in answers:
            doc = answer.doc
            program = f"{doc['prompt']}{answer.text}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\n"
            if program not in done:
                done[program] = int(run_code(program).passed)
            values.append(done[program])
            advance()
    return values


def _slices(made: dict[str, Any], base: Sequence[Any], leaf: known.Leaf, confidence: float) -> list[dict[str, Any]]:
    """The same scores for each member of a group, or each value of a column that tells rows apart."""
    if made["_values"] is None:
        return []
    column, values = "task", [answer.leaf for answer in base]
    if len(set(values)) == 1:
        named = [leaf.said("slice")] if leaf.said("slice") else list(SLICES)
        usable = [key for key in named if all(key in a.doc and isinstance(a.doc[key], str | int) for a in base)]
        column = next((key for key in usable if 1 < len({a.doc[key] for a in base}) <= MOST), "")
        if not column:
            return []
        values = [str(answer.doc[column]) for answer in base]
    found = []
    for value in sorted(set(values)):
        kept = [i for i, other in enumerate(values) if other == value]
        found.append({"slice": column, "name": value, "rows": len(kept)} | _part(made, kept, confidence))
    return found


def _part(made: dict[str, Any], kept: Sequence[int], confidence: float) -> dict[str, Any]:
    """Scores of some rows of a set."""
    before, after = _numbers(made["_values"])
    told = paired([before[i] for i in kept], [after[i] for i in kept], confidence)
    return {key: told[key] for key in ("base", "tuned", "difference", "test")}


def _contaminated(
    made: dict[str, Any],
    base: Sequence[Any],
    loaded: dict[str, Any],
    leaves: dict[str, known.Leaf],
    texts: Iterable[str],
    confidence: float,
) -> dict[str, Any] | None:
    """Scores of the rows that training rows contain and of the others; None where none is contained."""
    code = leaves[base[0].leaf].runs_code
    items = {
        name: [_item(loaded[name], name, i, doc, code) for i, doc in enumerate(loaded[name].eval_docs)]
        for name in dict.fromkeys(answer.leaf for answer in base)
    }
    found = found_in(items, code, texts)
    hit = [i for i, answer in enumerate(base) if f"{answer.leaf}:{answer.row}" in found]
    if not hit:
        return None
    rest = [i for i in range(len(base)) if i not in set(hit)]
    parts = {}
    for name, kept in (("clean", rest), ("hit", hit)):
        part = _part(made, kept, confidence) if kept and made["_values"] is not None else None
        parts[name] = {side: part[side] if part else None for side in ("base", "tuned")}
    rows = {f"{base[i].leaf}:{base[i].row}": found[f"{base[i].leaf}:{base[i].row}"] for i in hit}
    return {"index": INDEX, "rows": len(hit), **parts, "how": rows}


def _item(task: Any, name: str, number: int, doc: dict[str, Any], code: bool) -> Item:
    """What is looked for of a row: its question, and its answer where that is longer than a choice."""
    asked, answer = task.doc_to_text(doc), task.doc_to_target(doc)
    text = asked if isinstance(asked, str) else " ".join(map(str, doc.values()))
    return Item(f"{name}:{number}", text, answer if isinstance(answer, str) and not code else "")


def _told(made: dict[str, Any]) -> dict[str, Any]:
    """A set as scores.json has it: without the values of single rows."""
    return {key: value for key, value in made.items() if not key.startswith("_")}


def _interval(part: dict[str, Any], key: str, sign: str = "") -> str:
    value = f"{part[key]:{sign}.3f}"
    return value if part["low"] is None else f"{value} ({part['low']:{sign}.3f} to {part['high']:{sign}.3f})"
