"""The one door from words and YAML files to a typed recipe."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import compose, guard, keys
from finetune.compose import expand_sweep, from_config, load_recipe, read_recipe, recipe_folders, recipe_yaml
from finetune.errors import RecipeError
from finetune.recipe import Recipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
NAME = "legal_quickstart"


def problems(*words: str, config_dir: Path | None = None, name: str = NAME) -> list[str]:
    """The problems of words; fails when there are none."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, *words, config_dir=config_dir)
    return caught.value.problems


def only(found: list[str]) -> str:
    assert len(found) == 1, found
    return found[0]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's own folder of settings, with a recipe."""
    folder = tmp_path / "my settings"
    for group in ("recipe", "model", "data"):
        (folder / group).mkdir(parents=True)
    write(folder / "recipe" / "own.yaml", "defaults:", "  - override /model: olmoe", "name: own")
    return folder


def write(path: Path, *lines: str) -> None:
    head = ["# @package _global_"] if path.parent.name == "recipe" else []
    path.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


def test_a_recipe_takes_its_groups_its_own_settings_and_the_words_in_that_order() -> None:
    recipe = load_recipe(NAME, "train.lr=1e-5", "adapter=attention")
    assert (recipe.name, recipe.model.name, recipe.network) == (NAME, "smollm2_moe", True)
    assert recipe.train.lr == 1e-5
    assert recipe.train.accumulation == 1  # train/laptop.yaml, chosen by the recipe over train/default.yaml
    assert recipe.adapter.targets == "attention"
    assert recipe.evaluate.max_new_tokens == 12  # the recipe itself
    assert recipe.evaluate.confidence == Recipe().evaluate.confidence  # nobody but recipe.py


def test_a_word_wins_over_the_rehearsal_scale_which_wins_over_the_recipe() -> None:
    full = load_recipe("llama4_70b_legal")
    recipe = load_recipe("llama4_70b_legal", "scale=rehearsal", "train.max_steps=2")
    assert (recipe.scale, recipe.model.tiny, recipe.data.sample, recipe.network) == ("rehearsal", True, True, False)
    assert (recipe.train.max_steps, recipe.train.batch_size) == (2, 2)
    assert full.train.accumulation == 16 and recipe.train.accumulation == 1


def test_all_problems_are_told_at_once_and_each_says_what_to_do() -> None:
    found = problems("adapter.rnak=3", "train.lr=fast", "+trian.epochs=2", "data.train_files=rows.jsonl", "seed=null")
    assert len(found) == 5
    text = "\n".join(found)
    assert "CFG-001 adapter.rnak: there is no such setting. Nearest: adapter.rank." in text
    assert "CFG-001 trian.epochs: there is no such setting. Nearest: train.epochs." in text
    assert "CFG-004 train.lr=fast: expected a number, got 'fast'." in text
    assert "CFG-004 data.train_files=rows.jsonl: expected a list of texts such as [a,b], got 'rows.jsonl'." in text
    assert "CFG-004 seed=null: expected a whole number, got nothing." in text


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_typo_is_an_error_whatever_sign_stands_before_it(sign: str) -> None:
    assert "Nearest: adapter.expert_rank" in only(problems(f"{sign}adapter.expert_rnak=3"))


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_setting_is_set_whatever_sign_stands_before_it(sign: str) -> None:
    assert load_recipe(NAME, f"{sign}adapter.rank=3").adapter.rank == 3


def test_a_typo_in_a_file_is_told_with_the_nearest_key_and_the_file(mine: Path) -> None:
    write(mine / "recipe" / "typo.yaml", "name: typo", "adapter:", "  rnak: 4", "sed: 3")
    found = problems(config_dir=mine, name="typo")
    assert len(found) == 2
    assert "Nearest: adapter.rank." in found[0] and str(mine / "recipe" / "typo.yaml") in found[0]
    assert found[1].startswith("CFG-001 sed:") and "Nearest: seed." in found[1]


def test_a_recipe_file_without_its_package_line_is_told_what_it_lacks(mine: Path) -> None:
    (mine / "recipe" / "bare.yaml").write_text("name: bare\n")
    assert "@package _global_" in only(problems(config_dir=mine, name="bare"))


@pytest.mark.parametrize(
    "group", ["recipe", "model", "data", "adapter", "train", "launch", "evaluate", "merge", "export", "costs", "scale"]
)
def test_an_unknown_option_lists_those_that_exist(group: str) -> None:
    exist = [path.stem for path in (RECIPES / group).glob("*.yaml")]
    assert exist
    text = only(problems(f"{group}=nonsense"))
    assert text.startswith(f"CFG-002 {group}=nonsense does not exist.")
    assert all(name in text for name in exist)


def test_an_unknown_option_inside_a_file_lists_those_that_exist(mine: Path) -> None:
    write(mine / "recipe" / "bad.yaml", "defaults:", "  - override /model: olmo", "name: bad")
    text = only(problems(config_dir=mine, name="bad"))
    assert "CFG-002 model=olmo does not exist. Nearest: olmoe." in text


def test_the_nearest_option_is_named() -> None:
    assert "Nearest: legal_quickstart." in only(problems(name="legal_quikstart"))


@pytest.mark.parametrize(
    ("word", "code"),
    [
        ("hydra.run.dir=/tmp", "CFG-005"),
        ("hydra/launcher=basic", "CFG-005"),
        ("hydra.searchpath=[file:///tmp]", "CFG-005"),
        ("+model._target_=os.system", "CFG-005"),
        ("+model.config.deep.er._target_=os.system", "CFG-005"),
        ("+model={_target_: os.system}", "CFG-002"),
        ("++model.config={rope: {_target_: os.system, _args_: [ls]}}", "CFG-005"),
        ("train.lr=${oc.env:HOME}", "CFG-007"),
        ("name=${oc.env:HOME}", "CFG-007"),
        ("name='x ${oc.env:HOME}'", "CFG-007"),
        ("name=${oc.decode:${oc.env:HOME}}", "CFG-003"),
        ("name='${oc.decode:${oc.env:HOME}}'", "CFG-007"),
        ("train.lr=${train.nothing}", "CFG-007"),
        ("~train.lr", "CFG-003"),
        ("model@data=olmoe", "CFG-003"),
        ("adapter.rank=8,16", "CFG-003"),
        ("rank", "CFG-003"),
        ("model=null", "CFG-002"),
        ("train=[default]", "CFG-002"),
    ],
)
def test_what_could_load_code_or_move_settings_is_refused(word: str, code: str) -> None:
    assert any(problem.startswith(code) for problem in problems(word))


def test_a_plain_reference_takes_the_value_it_names_even_a_default() -> None:
    assert load_recipe(NAME, "adapter.expert_rank=${adapter.rank}").adapter.expert_rank == 16
    assert load_recipe(NAME, "evaluate.rows=${data.max_length}").evaluate.rows > 0


SECRETS = [
    ("model.source=https://me:hunter2@host/x", "hunter2"),
    ("+hf_token=abcdef", "abcdef"),
    ("model.note=hf_AbCdEfGhIjKlMnOpQr", "hf_AbC"),
    ("model.note=AKIAIOSFODNN7EXAMPLE", "AKIA"),
    ("+model.api_key=zzz", "zzz"),
    ("+password=letmein", "letmein"),
    ("train.lr=hf_AbCdEfGhIjKlMnOpQr", "hf_AbC"),
    ("model.config={x: ghp_0123456789abcdefghij}", "ghp_"),
]


@pytest.mark.parametrize(("word", "secret"), SECRETS)
def test_a_secret_is_refused_and_not_repeated(word: str, secret: str) -> None:
    found = problems(word)
    assert any(problem.startswith("CFG-006") and "environment" in problem for problem in found)
    assert secret not in "\n".join(found)


def test_a_secret_in_a_file_is_refused_and_not_repeated(mine: Path) -> None:
    write(mine / "recipe" / "leak.yaml", "name: leak", "purpose: hf_AbCdEfGhIjKlMnOpQr")
    found = "\n".join(problems(config_dir=mine, name="leak"))
    assert "CFG-006" in found and "hf_AbC" not in found


@pytest.mark.parametrize("word", ["evaluate.max_new_tokens=9", "++model.config.eos_token_id=3", "name=tokens_of_law"])
def test_words_that_only_look_like_secrets_are_taken(word: str) -> None:
    load_recipe(NAME, word)


def test_the_users_folder_comes_before_ours_and_ours_stays_reachable(mine: Path) -> None:
    write(mine / "model" / "olmoe.yaml", "name: mine_olmoe", "family: olmoe")
    recipe = load_recipe("own", config_dir=mine)
    assert (recipe.name, recipe.model.name) == ("own", "mine_olmoe")
    assert load_recipe("own", "model=smollm2_moe", config_dir=mine).model.name == "smollm2_moe"
    assert load_recipe("olmoe_7b_legal", config_dir=mine).model.name == "mine_olmoe"
    assert {"own", NAME} <= set(compose.recipe_names(mine))


def test_a_missing_users_folder_is_an_error(tmp_path: Path) -> None:
    assert only(problems(config_dir=tmp_path / "nowhere")).startswith("CFG-009")


@pytest.mark.parametrize(
    ("file", "text", "code"),
    [
        ("model/bomb.yaml", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "CFG-008"),
        ("model/broken.yaml", "a: [1\n", "CFG-008"),
        ("model/list.yaml", "- a\n", "CFG-008"),
        ("model/code.yaml", "config:\n  _target_: os.system\n", "CFG-005"),
        ("model/env.yaml", "note: ${oc.env:HOME}\n", "CFG-007"),
        ("recipe/hydra.yaml", "hydra:\n  searchpath: [file:///tmp]\n", "CFG-005"),
        ("hydra/launcher/basic.yaml", "a: 1\n", "CFG-005"),
    ],
)
def test_a_users_folder_with_something_forbidden_is_refused_by_file(
    mine: Path, file: str, text: str, code: str
) -> None:
    (mine / file).parent.mkdir(parents=True, exist_ok=True)
    (mine / file).write_text(text)
    found = [p for p in problems(config_dir=mine, name="own") if p.startswith(code)]
    assert len(found) == 1 and str(mine / file) in found[0]


def test_a_frozen_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe(
        "deepseek_v4_legal", "train.lr=0.1", "data.train_files=[a.jsonl,'b c.jsonl']", "export.name='007'"
    )
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe), encoding="utf-8")
    assert read_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2\n", "a: &x 1\nb: *x\n", "[1, 2]\n", "seed: {\n", "sede: 1\n"])
def test_a_frozen_recipe_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError):
        read_recipe(tmp_path / "recipe.yaml")


def test_reading_a_frozen_recipe_imports_no_hydra(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(Recipe(name="x")))
    code = (
        "import sys; from pathlib import Path; from finetune.compose import read_recipe\n"
        f"read_recipe(Path({str(tmp_path / 'recipe.yaml')!r})); assert 'hydra' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=RECIPES.parent)


def test_an_absent_key_takes_the_default_and_nothing_else() -> None:
    assert from_config({}) == Recipe()
    assert from_config({"adapter": {"rank": 5}}).adapter == dataclasses.replace(Recipe().adapter, rank=5)


def test_a_section_with_a_bare_value_is_told_to_name_a_setting() -> None:
    with pytest.raises(RecipeError, match="CFG-004 adapter is a group of settings"):
        from_config({"adapter": 3})


@pytest.mark.parametrize(
    ("words", "jobs"),
    [
        (["recipe=x", "adapter.rank=8,16"], [["recipe=x", "adapter.rank=8"], ["recipe=x", "adapter.rank=16"]]),
        (["a=1,2", "b=x,y"], [["a=1", "b=x"], ["a=1", "b=y"], ["a=2", "b=x"], ["a=2", "b=y"]]),
        (["a=range(1,4)"], [["a=1"], ["a=2"], ["a=3"]]),
        (["a=choice(4,8)"], [["a=4"], ["a=8"]]),
        (["a=[1,2]", "b='x,y'"], [["a=[1,2]", "b='x,y'"]]),
        (["recipe=x,y"], [["recipe=x"], ["recipe=y"]]),
    ],
)
def test_a_sweep_is_every_combination_of_its_values(words: list[str], jobs: list[list[str]]) -> None:
    assert expand_sweep(words) == jobs


@pytest.mark.parametrize("word", ["a=glob(*)", "a=interval(1,2)", "nonsense", "a=[1"])
def test_a_sweep_without_a_list_of_values_is_refused(word: str) -> None:
    with pytest.raises(RecipeError, match="CFG-003"):
        expand_sweep([word])


def test_the_checkouts_recipes_are_used_when_there_is_a_checkout() -> None:
    assert recipe_folders() == [RECIPES]


def test_every_setting_has_a_type_that_an_error_can_name() -> None:
    known = keys.settings(Recipe)
    assert len(known) > 60
    assert all(kind in keys.TYPE_WORDS for kind in known.values())


def test_no_file_of_ours_names_a_class_a_resolver_or_a_secret() -> None:
    import yaml

    files = sorted(RECIPES.rglob("*.yaml"))
    assert len(files) > 25
    for path in files:
        assert guard.yaml_problem(path) == ""
        assert guard.forbidden(yaml.safe_load(path.read_text(encoding="utf-8"))) == {}
