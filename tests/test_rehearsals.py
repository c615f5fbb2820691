"""Every recipe, whole: data, train, evaluate, merge, export, report and record, on a tiny model of its family."""

import json

import pytest
import torch
import transformers

from finetune.compose import load_recipe, recipe_names
from finetune.families import FAMILIES
from finetune.run import run
from finetune.rundir import read_json
from finetune.verify import differences

NAMES = recipe_names()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_there_are_eight_recipes_or_more_for_eight_families_or_more():
    assert len(NAMES) >= 8
    assert len({load_recipe(name).model.family for name in NAMES}) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_rehearsal_leaves_everything_a_full_run_would(name, tmp_path, cache):
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
