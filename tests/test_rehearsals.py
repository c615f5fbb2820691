"""Recipes on a tiny model of their family: whole, from the data to the record, or as far as their rows.

A rehearsal takes long, and two recipes of one family differ in their rows and in numbers. So one recipe of each family
is rehearsed whole by default, chosen so that every card is among them, and of all others the rows are prepared.
`-m recipes` rehearses those whole too.
"""

import json

import pytest
import torch
import transformers
import yaml

from finetune import check
from finetune.compose import load_recipe, recipe_folders, recipe_names
from finetune.data.prepare import prepared
from finetune.families import FAMILIES
from finetune.merge.prove import prove
from finetune.run import run
from finetune.rundir import read_json
from finetune.source import base_folder
from finetune.verify import differences

NAMES = recipe_names()
WHOLE = [
    "deepseek_v3_finance",
    "deepseek_v4_legal",
    "glm4_moe_legal",
    "gpt_oss_120b_support",
    "granite_3b_medical",
    "llama4_70b_legal",
    "mistral_large3_government",
    "olmoe_7b_math",
    "privacy_quickstart",
    "qwen3_235b_code",
    "qwen3_5_35b_code",
]
"""One recipe of each family; every card that a recipe names is in one of them."""
OTHERS = [name for name in NAMES if name not in WHOLE]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def family_and_rows(name):
    """What a recipe file chooses, read without composing all of it."""
    folder = recipe_folders()[0]
    chosen = {}
    for line in yaml.safe_load((folder / "recipe" / f"{name}.yaml").read_text())["defaults"]:
        chosen |= line
    model = yaml.safe_load((folder / "model" / f"{chosen['override /model']}.yaml").read_text())
    return model["family"], chosen["override /data"]


def test_the_recipes_that_are_rehearsed_whole_are_one_of_each_family_and_have_all_kinds_of_rows():
    every, whole = ({name: family_and_rows(name) for name in names} for names in (NAMES, WHOLE))
    families = [family for family, _ in whole.values()]
    assert len(families) == len(set(families)) == 11
    assert set(families) == {family for family, _ in every.values()}
    assert {rows for _, rows in whole.values()} == {rows for _, rows in every.values()}
    assert len(NAMES) == len(WHOLE) + len(OTHERS) == 42


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_recipe_may_start_and_its_rows_can_be_prepared_for_its_family(name, cache):
    recipe = load_recipe(name, "scale=rehearsal", f"cache_dir={cache}")
    assert check.problems(recipe) == []
    folder = prepared(recipe, base_folder(recipe))  # the data stage, without a run folder around it
    sides = read_json(folder / "report.json")["splits"]
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert len(ledger) == 24 == sides["train"]["rows"] + sides["heldout"]["rows"]
    assert min(sides["train"]["rows"], sides["heldout"]["rows"]) >= 2
    assert {row["verdict"] for row in ledger} == {"kept"}


def proved_here(run_dir, folder, say):
    """The same proof in this process; a fresh one takes ten seconds to begin. The first recipe has a fresh one."""
    prove(run_dir, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WHOLE, *(pytest.param(name, marks=pytest.mark.recipes) for name in OTHERS)])
def test_a_rehearsal_leaves_everything_a_full_run_would(name, tmp_path, cache, monkeypatch):
    if name != WHOLE[0]:
        monkeypatch.setattr("finetune.merge.prove_apart", proved_here)
    recipe = load_recipe(name, "scale=rehearsal", f"runs_dir={tmp_path}", f"cache_dir={cache}")
    assert not recipe.network
    done = run(recipe)

    ledger = [json.loads(line) for line in (done.data / "ledger.jsonl").read_text().splitlines()]
    rows = read_json(done.data / "report.json")["splits"]
    assert len(ledger) == 24
    assert sum(row["verdict"] == "kept" for row in ledger) == rows["train"]["rows"] + rows["heldout"]["rows"]

    train = read_json(done.train)
    assert [step["step"] for step in train["steps"]] == [1, 2, 3, 4]
    assert all(step["loss"] > 0 and step["grad_norm"] > 0 for step in train["steps"])
    cover = {row["group"]: row for row in train["coverage"]}
    family = FAMILIES[recipe.model.family]
    assert cover["attention"]["trainable"] > 0
    if family.experts:
        assert cover["routed"]["trainable"] > 0
        assert cover["routed"]["parameters_4bit"] > 0.97 * cover["routed"]["parameters"]
    assert "router" not in cover or cover["router"]["trainable"] == 0

    scores = read_json(done.scores)
    assert scores["base"]["loss"] != scores["tuned"]["loss"]
    assert len(scores["samples"]) == 2
    assert [each["rows"] for each in scores["forgetting"]["sets"]] == [12]
    assert (scores["safety"]["prompts"], scores["safety"]["benign"], len(scores["safety"]["examples"])) == (4, 4, 8)

    parity = read_json(done.export / "parity.json")
    assert parity["mean_kl"] < 0.01 < 1.0
    assert parity["top1_agreement"] >= 0.8  # random weights have near-ties, which rounding to bf16 may turn round
    model = getattr(transformers, family.auto_class).from_pretrained(done.export / "hf", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(done.export / "hf")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**chat, max_new_tokens=2, do_sample=False).shape[1] == chat["input_ids"].shape[1] + 2

    page = done.report.read_text()
    assert recipe.name in page
    assert differences(done) == []
    left = [path.name for path in done.path.rglob("*") if path.name.startswith(".partial-")]
    assert not left


@pytest.mark.slow
def test_a_code_recipe_takes_humaneval_before_and_after_only_where_code_may_run(tmp_path, cache):
    words = ("scale=rehearsal", f"runs_dir={tmp_path}", f"cache_dir={cache}", "evaluate=code", "evaluate.task_rows=2")
    for name in [name for name in NAMES if name.endswith("_code")]:
        (said,) = check.problems(load_recipe(name, *words))
        assert said.startswith("TSK-005") and "evaluate.allow_code=true" in said
        recipe = load_recipe(name, *words, "evaluate.allow_code=true")
        assert check.problems(recipe) == [] and load_recipe(name, *words[:3]).evaluate.tasks == []
    done = run(recipe, until="evaluate")
    (one,) = read_json(done.scores)["tasks"]["sets"]
    assert (one["task"], one["metric"], one["rows"]) == ("code_humaneval", "pass@1", 2)
    assert one["base"]["value"] == one["tuned"]["value"] == 0.0  # random weights write no program
    assert len(done.scores_rows.read_text().splitlines()) == read_json(done.scores)["rows"] == 8
