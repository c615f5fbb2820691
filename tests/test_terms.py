"""What licences forbid is refused before anybody trains for a day, with the rule and where it stands."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from finetune import check, licences, permits, terms
from finetune.compose import load_recipe
from finetune.errors import RecipeError
from finetune.families import FAMILIES
from finetune.recipe import Recipe
from finetune.run import carry_on, run, start
from finetune.rundir import RunDir, open_run, read_json
from tests.job import Stages, good, ready

LLAMA = (
    "LLAMA 4 COMMUNITY LICENSE AGREEMENT\n\nLlama 4 Version Effective   Date: April 5, 2025\n\n“Agreement” means ..."
)
DEEPSEEK = "DEEPSEEK LICENSE AGREEMENT\nVersion 1.0, 23 October 2023\n...\nAttachment A\nUse Restrictions"


def rules(recipe: Recipe) -> list[str]:
    return [sentence[:7] for sentence in check.problems(recipe)]


def mit(tail: str = "") -> str:
    """The MIT licence, as it is published."""
    return f"""MIT License

Copyright (c) 2025 Somebody

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
{tail}"""


def test_a_renamed_derivative_is_refused_with_the_rule_and_its_source() -> None:
    recipe = load_recipe("llama4_70b_legal", "export.name=acme-legal-v1")
    (sentence,) = check.problems(recipe)
    assert sentence.startswith('LIC-001 export.name=acme-legal-v1 must begin with "Llama" (Llama 4 Community License')
    assert "https://github.com/meta-llama/llama-models/blob/main/models/llama4/LICENSE, read 2026-11-25" in sentence
    assert sentence.endswith("Set export.name=Llama-acme-legal-v1.")


def test_a_card_that_names_no_licence_is_under_that_of_its_family() -> None:
    recipe = load_recipe("llama4_70b_legal", "export.name=acme-legal-v1", "model.licence=''")
    assert rules(recipe) == ["LIC-001"]


def test_a_word_in_the_recipe_does_not_free_a_base_from_the_licence_of_its_family(tmp_path: Path) -> None:
    words = ["export.name=acme", "licence.established_in=DE", "licence.monthly_users=700000001"]
    for licence in ("mit", "apache-2.0", "acme-1.0"):
        recipe = load_recipe("llama4_70b_legal", f"model.licence={licence}", *words)
        found = check.problems(recipe)
        assert [sentence[:7] for sentence in found] == ["LIC-001", "LIC-004", "LIC-006"]
        assert all("put its text as LICENSE beside them" in sentence for sentence in found)
        assert {"LIC-001", "LIC-004", "LIC-006"} <= {v.rule for v in permits.broken_rules(recipe, None)}
    recipe.model.source, recipe.model.licence = str(tmp_path), "mit"
    for text, bound in ((LLAMA, True), ("Terms that nobody knows.", True), (mit(), False)):
        (tmp_path / "LICENSE").write_text(text)
        told = {*rules(recipe), *(verdict.rule for verdict in permits.broken_rules(recipe, tmp_path))}
        assert ({"LIC-001", "LIC-004", "LIC-006"} <= told) == bound
    assert rules(recipe) == [] and permits.broken_rules(recipe, tmp_path) == []
    assert rules(good(model__licence="mit", export__name="acme")) == []


@pytest.mark.parametrize("country", ["DE", "FR", "IE", "EU"])
def test_a_multimodal_base_that_gives_no_rights_in_the_european_union_is_refused_there(country: str) -> None:
    (sentence,) = check.problems(load_recipe("llama4_70b_legal", f"licence.established_in={country}"))
    assert sentence.startswith(f"LIC-004 licence.established_in={country}: ")
    assert "https://www.llama.com/llama4/use-policy" in sentence and "Choose another base" in sentence


@pytest.mark.parametrize("country", ["US", "GB", "CH", "NO"])
def test_it_is_not_refused_elsewhere_and_asked_where_nobody_says(country: str) -> None:
    assert check.problems(load_recipe("llama4_70b_legal", f"licence.established_in={country}")) == []
    (asked, _) = terms.open_questions(load_recipe("llama4_70b_legal"))
    assert asked.startswith("LIC-004 licence.established_in=(not said)") and "licence.established_in=US" in asked


def test_there_are_as_many_member_states_as_the_union_has() -> None:
    assert len(terms.EU) == 27 and not {"GB", "CH", "NO", "UK"} & terms.EU


@pytest.mark.parametrize("key", [key for key, row in licences.licences().items() if row.non_commercial])
def test_a_base_that_is_not_for_commercial_use_asks_for_the_use_and_refuses_that_one(key: str) -> None:
    for use in ("commercial", "not_said"):
        (sentence,) = check.problems(good(model__licence=key, licence__use=use))
        assert sentence.startswith(f"LIC-003 licence.use={use}: commercial use of this base is not allowed (")
        assert licences.licences()[key].source in sentence
    assert check.problems(good(model__licence=key, licence__use="research")) == []


def test_several_licences_are_known_not_to_allow_commercial_use() -> None:
    assert sum(row.non_commercial for row in licences.licences().values()) >= 3


def test_more_users_than_a_licence_allows_are_refused_and_fewer_are_not() -> None:
    (sentence,) = check.problems(good(model__licence="qwen-license", licence__monthly_users=100_000_001))
    assert sentence.startswith("LIC-006 licence.monthly_users=100000001: above 100,000,000 users there are no rights")
    assert check.problems(good(model__licence="qwen-license", licence__monthly_users=100_000_000)) == []
    assert rules(load_recipe("llama4_70b_legal", "licence.monthly_users=700000001")) == ["LIC-006"]


@pytest.mark.parametrize("licence", ["CC-BY-NC-4.0", "CC BY-NC-SA 3.0", "non-commercial, from a publisher"])
def test_rows_that_are_not_for_commercial_use_ask_for_the_use(tmp_path: Path, licence: str) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    own = {"data__card": "", "data__train_files": [str(tmp_path / "rows.jsonl")], "licence__of_rows": licence}
    assert rules(good(**own, licence__use="commercial")) == ["LIC-005"]
    assert rules(good(**own)) == ["LIC-005"]
    assert check.problems(good(**own, licence__use="research")) == []
    assert check.problems(good(**(own | {"licence__of_rows": "CC-BY-4.0"}), licence__use="commercial")) == []


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("licence__established_in", "Germany", "LIC-008 licence.established_in=Germany is no code of two letters"),
        ("licence__accept", "yes", "LIC-008 licence.accept=yes must be the 64 hex digits"),
        ("licence__of_rows", "MIT", "LIC-008 licence.of_rows has no effect with a data card"),
        ("licence__use", "military", "CHK-001 licence.use=military is not one of not_said, commercial, research"),
        ("licence__monthly_users", -1, "CHK-002 licence.monthly_users=-1 must be at least 0"),
    ],
)
def test_what_is_said_of_the_use_must_be_understood(key: str, value: Any, told: str) -> None:
    (sentence,) = check.problems(good(**{key: value}))
    assert sentence.startswith(told)


def test_the_random_weights_of_a_rehearsal_are_under_no_licence() -> None:
    words = ["export.name=acme", "licence.established_in=DE"]
    assert rules(load_recipe("llama4_70b_legal", *words)) == ["LIC-001", "LIC-004"]
    assert check.problems(load_recipe("llama4_70b_legal", "scale=rehearsal", *words)) == []
    assert permits.broken_rules(load_recipe("llama4_70b_legal", "scale=rehearsal", *words), None) == []


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (licences.standard_text("apache-2.0"), "apache-2.0"),
        (mit(), "mit"),
        (LLAMA, "llama4"),
        (DEEPSEEK, "deepseek-model-1.0"),
        (mit("Our only change: above 100 million users, show our name."), None),
        (licences.standard_text("apache-2.0").replace("irrevocable", "revocable"), None),
        (mit().replace("free of charge", "free of charge for research"), None),
        ("Llama 4 Version Effective Date: April 5, 2025", None),
        ("All rights reserved.", None),
        ("", None),
    ],
)
def test_a_text_is_told_by_its_own_words_and_a_changed_one_is_not(text: str, key: str | None) -> None:
    found = licences.recognise(text)
    assert (found.key if found else None) == key


def test_the_standard_text_that_comes_with_us_is_that_of_our_own_licence() -> None:
    ours = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
    assert licences.standard_text("apache-2.0") == ours and "Version 2.0, January 2004" in ours
    assert licences.standard_text("mit") == licences.standard_text("../licences") == ""


def unknown(tmp_path: Path, text: str = "Terms of our own.", **changes: Any) -> tuple[Recipe, str]:
    """A recipe whose base has a licence text that nobody knows, and the text's hash."""
    recipe = ready(tmp_path, **({"model__licence": "acme-1.0"} | changes))
    (tmp_path / "base" / "LICENSE.txt").write_text(text)
    return recipe, hashlib.sha256(text.encode()).hexdigest()


def test_an_unknown_text_may_be_trained_on_and_not_exported_and_the_message_has_its_hash(tmp_path: Path) -> None:
    recipe, sha = unknown(tmp_path)
    with pytest.raises(RecipeError) as caught:
        run(recipe, launch=Stages())
    assert caught.value.exit_code == 2
    assert caught.value.sentence().startswith("LIC-007 the text of LICENSE.txt beside the weights is not known here")
    assert f"licence.accept={sha}" in caught.value.sentence()
    assert not (tmp_path / "runs").exists(), "it is said before a run begins"
    trained = run(recipe, until="evaluate", launch=Stages())
    assert trained.scores.exists()
    with pytest.raises(RecipeError, match="LIC-007"):
        carry_on(trained, until="export", launch=Stages())


def test_an_accepted_text_is_exported_and_the_record_keeps_which_one(tmp_path: Path) -> None:
    recipe, sha = unknown(tmp_path)
    recipe.licence.accept = sha
    told = read_json(run(recipe, launch=Stages()).record)["licences"]
    assert told["text"] == {"file": "LICENSE.txt", "sha256": sha} and told["said"]["accept"] == sha
    assert [v["passed"] for v in told["verdicts"] if v["rule"] == "LIC-007"] == [True]
    (tmp_path / "base" / "LICENSE.txt").write_text("Other terms.")
    with pytest.raises(RecipeError, match="LIC-007"):
        start(recipe)


def test_a_text_may_be_accepted_beside_run_after_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from finetune.__main__ import main
    from finetune.commands import Request, recipe_of

    recipe, sha = unknown(tmp_path)
    trained = run(recipe, until="evaluate", launch=Stages())
    assert main(["export", f"run={trained.path}"]) == 2
    assert main(["export", f"run={trained.path}", "licence.accept=yes"]) == 2
    assert "LIC-008" in capsys.readouterr().err
    recipe_of(Request(verb="export", run=str(trained.path), settings=[f"licence.accept={sha}"]))
    done = carry_on(open_run(trained.path), launch=Stages())
    assert read_json(done.record)["licences"]["accepted"] == [sha]
    assert f'"licence": "{sha}"' in done.events.read_text()


def test_a_text_that_is_another_licence_than_the_recipe_says_is_refused(tmp_path: Path) -> None:
    recipe, _ = unknown(tmp_path, LLAMA, model__licence="apache-2.0")
    with pytest.raises(RecipeError) as caught:
        start(recipe)
    assert [problem[:7] for problem in caught.value.problems] == ["LIC-001", "LIC-002"]
    assert "beside the weights is the Llama 4 Community License Agreement" in caught.value.sentence()


def test_a_licence_of_which_only_a_summary_was_read_must_be_accepted_as_a_text(tmp_path: Path) -> None:
    recipe = ready(tmp_path, model__licence="gemma-terms")
    with pytest.raises(RecipeError, match="LIC-007 of the Gemma Terms of Use only a summary was read here"):
        start(recipe)
    assert start(ready(tmp_path, model__licence="apache-2.0")).recipe.exists()


def test_a_base_without_any_licence_is_trained_and_not_exported(tmp_path: Path) -> None:
    config = dict(FAMILIES["llama"].tiny)
    recipe = ready(tmp_path, model__licence="", model__family="llama", model__config=config)
    verdicts = permits.broken_rules(recipe, tmp_path / "base")
    assert [v.rule for v in verdicts] == ["LIC-007"] and "model.licence=(empty)" in verdicts[0].what


def test_a_text_that_is_fetched_later_is_looked_at_before_training(tmp_path: Path, monkeypatch: Any) -> None:
    """A base that is no folder at the start: its text is seen when the data stage has fetched it."""
    from finetune import source

    recipe, _ = unknown(tmp_path)
    monkeypatch.setattr(permits, "folder_at_hand", lambda recipe: None)
    monkeypatch.setattr(source, "base_folder", lambda recipe: tmp_path / "base")
    stages = Stages()
    with pytest.raises(RecipeError, match="LIC-007"):
        run(recipe, launch=stages)
    assert stages.done == ["data"]


def test_of_several_texts_the_one_of_the_weights_counts(tmp_path: Path) -> None:
    for name in ("LICENSE-CODE", "LICENSE-MODEL", "LICENSE"):
        (tmp_path / name).write_text(DEEPSEEK if name == "LICENSE-MODEL" else mit())
    text = permits.licence_text(tmp_path)
    assert (
        text is not None and text.file == "LICENSE-MODEL" and licences.recognise(text.words).key == "deepseek-model-1.0"
    )
    (tmp_path / "LICENSE-MODEL").unlink()
    assert permits.licence_text(tmp_path).file == "LICENSE"


def test_every_verdict_of_a_run_has_a_source(tmp_path: Path) -> None:
    recipe = load_recipe("llama4_70b_legal", "licence.established_in=DE", "licence.use=commercial")
    found = permits.verdicts(recipe, None)
    assert {v.rule for v in found} == {"LIC-001", "LIC-004", "LIC-006", "LIC-007"}
    assert all("https://" in v.source for v in found)
    assert RunDir(tmp_path).allowed.exists() is False and permits.accepted_in(RunDir(tmp_path)) == []
