"""The recipes there are: which domain on which base, under which licences, and how short they stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune import check, permits
from finetune.compose import GROUPS, compose, load_recipe, recipe_names
from finetune.data.card import read_card
from finetune.errors import RecipeError
from finetune.keys import flatten, settings
from finetune.recipe import Recipe
from finetune.terms import NON_COMMERCIAL

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
FILES = sorted((FOLDER / "recipe").rglob("*.yaml"))
DOMAINS = ("legal", "medical", "finance", "government")
"""Domains with rows that may be trained on."""
LARGE = (
    "deepseek_v3",
    "deepseek_v4",
    "glm4_moe",
    "gpt_oss_120b",
    "llama4_scout",
    "mistral_large3",
    "qwen3_235b",
    "qwen3_30b",
)
"""Bases that have a recipe for each of them."""
BESIDE = {
    ("code", "qwen3_235b"),
    ("code", "qwen3_30b"),
    ("code", "qwen3_5_35b"),
    ("legal", "olmoe"),
    ("legal", "smollm2_moe"),
    ("math", "olmoe"),
    ("medical", "granite_3b_a800m"),
    ("support", "gpt_oss_120b"),
    ("support", "qwen3_30b"),
}
"""What else there is: (domain, base). Code and support train on the user's own rows."""
OWN_ROWS = {"code", "support"}


@pytest.fixture(scope="module")
def recipes() -> dict[str, Recipe]:
    return {path.stem: load_recipe(path.stem) for path in FILES}


def domain(recipe: Recipe) -> str:
    return recipe.data.card.partition("_")[0]


def test_there_is_a_recipe_for_every_domain_with_rows_on_every_large_base(recipes: dict[str, Recipe]) -> None:
    assert len(FILES) == 42 and recipe_names() == sorted(recipes)
    assert {path.parent for path in FILES} == {FOLDER / "recipe"}
    places = [(domain(recipe), recipe.model.name) for recipe in recipes.values()]
    assert set(places) == {(d, base) for d in DOMAINS for base in LARGE} | BESIDE
    assert len(places) == len(set(places)) + 1  # two quickstarts: licence texts, and clauses of privacy policies


def test_a_recipe_is_called_as_its_file_and_its_base_and_domain_are_in_its_name(recipes: dict[str, Recipe]) -> None:
    for name, recipe in recipes.items():
        assert recipe.name == name and recipe.purpose.endswith(".")
        if recipe.model.name in LARGE and name != "llama4_70b_legal":
            assert name == f"{recipe.model.name}_{domain(recipe)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_says_only_what_differs_from_its_groups_in_a_few_lines(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    head = [line for line in text.splitlines()[1:] if line.startswith("#")]
    assert 10 <= len(text.splitlines()) <= 25
    assert any(line.startswith("# Measured: ") for line in head)
    own: dict[str, Any] = yaml.safe_load(text)
    chosen = [
        f"{key.removeprefix('override /')}={option}" for line in own.pop("defaults") for key, option in line.items()
    ]
    assert {word.partition("=")[0] for word in chosen} <= set(GROUPS)
    known = settings(Recipe)
    said = dict(flatten({k: v for k, v in own.items() if k not in ("name", "purpose")}, known))
    if said:
        without = compose([*chosen, "name=x"])
        for key, value in said.items():
            section, _, leaf = key.rpartition(".")
            there: Any = getattr(without, section) if section else without
            assert getattr(there, leaf) != value, f"{key}: its groups say that already"


def test_no_two_recipes_are_the_same_job(recipes: dict[str, Recipe]) -> None:
    seen = {}
    for name, recipe in recipes.items():
        job = (recipe.model.name, recipe.data.card, recipe.train.lr, recipe.data.max_length)
        assert job not in seen, f"{name} and {seen[job]}"
        seen[job] = name


def test_every_recipe_trains_on_rows_that_may_be_trained_on_and_used(recipes: dict[str, Recipe]) -> None:
    for name, recipe in recipes.items():
        card = read_card(recipe.data.card)
        assert card.use == "train" and not NON_COMMERCIAL.search(card.licence), name
        assert "unverified" not in card.licence and len(card.licence_source.split()) >= 4, name
        assert (card.reader == "files") == (domain(recipe) in OWN_ROWS), name


def test_no_licence_of_base_or_rows_forbids_commercial_use_of_any_recipe(recipes: dict[str, Recipe]) -> None:
    for name, recipe in recipes.items():
        recipe.licence.use, recipe.licence.established_in, recipe.licence.monthly_users = "commercial", "US", 1000
        assert permits.broken_rules(recipe, None) == [], name
        assert check.problems(recipe) == [], name
    recipes["llama4_scout_legal"] = recipes["llama4_70b_legal"]
    named = recipes["llama4_scout_legal"]
    named.export.name = "Our-model"  # the rule is looked at: another name is refused
    assert [verdict.rule for verdict in permits.broken_rules(named, None)] == ["LIC-001"]


def test_rows_of_ones_own_take_the_place_of_the_sample_card(tmp_path: Path) -> None:
    rows = tmp_path / "tasks.jsonl"
    rows.write_text('{"messages": []}\n')
    recipe = load_recipe("qwen3_30b_code", f"data.train_files=[{rows}]")
    assert recipe.data.card == "" and recipe.data.train_files == [str(rows)] and recipe.data.heldout_fraction > 0


def test_every_recipe_takes_any_base_by_its_name() -> None:
    recipe = load_recipe("mistral_large3_government", "model=glm4_moe", "costs=h200", "train=one_gpu")
    assert (recipe.model.name, recipe.data.card) == ("glm4_moe", "government_controls")
    assert (recipe.costs.device_gib, recipe.train.batch_size) == (139.0, 4)
    with pytest.raises(RecipeError, match=r"CFG-002 costs=h300 .*Nearest: h"):
        load_recipe("mistral_large3_government", "costs=h300")
