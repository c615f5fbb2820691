"""What an export carries besides weights: the card, the licence, the notice, the bill of materials."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard

from finetune import record
from finetune.compose import load_recipe, read_recipe
from finetune.errors import RecipeError
from finetune.export.card import card, metadata
from finetune.export.papers import lacking, require_permits, write_papers
from finetune.licences import standard_text
from finetune.recipe import Recipe
from finetune.run import run
from finetune.rundir import RunDir, read_json
from tests.job import Stages, ready
from tests.test_terms import LLAMA, mit

PRESCRIBED = (
    "Llama 4 is licensed under the Llama 4 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."
)


def exported(tmp_path: Path, texts: dict[str, str] | None = None, **changes: Any) -> Path:
    """The folder of an export of a run of `Stages`, with papers; `texts` lie beside the weights."""
    tmp_path.mkdir(exist_ok=True)
    recipe = ready(tmp_path, **changes)
    for name, text in (texts or {}).items():
        (tmp_path / "base" / name).write_text(text, encoding="utf-8")
    run_dir = run(recipe, until="merge", launch=Stages())
    folder = tmp_path / "export"
    for part in ("hf", "peft"):
        (folder / part).mkdir(parents=True)
        (folder / part / "model.safetensors").write_bytes(b"weights")
    write_papers(run_dir, recipe, tmp_path / "base", folder)
    return folder


def front(folder: Path) -> dict[str, Any]:
    """The metadata block of the card, read by the hub's own library."""
    return ModelCard.load(folder / "README.md").data.to_dict()


def facts(recipe: Recipe, tmp_path: Path) -> dict[str, Any]:
    """What the record of a run with these settings says."""
    run_dir = run(ready(tmp_path), until="merge", launch=Stages())
    return record.derived(run_dir, recipe, tmp_path / "base")


def test_the_card_has_licence_base_data_and_scores_as_hubs_read_them(tmp_path: Path) -> None:
    told = front(exported(tmp_path, model__title="Some-MoE-7B", export__name="my-model"))
    assert told["license"] == "apache-2.0" and told["base_model"] == "Some-MoE-7B"
    (result,) = told["model-index"][0]["results"]
    assert told["model-index"][0]["name"] == "my-model"
    assert result["dataset"]["split"] == "heldout"
    assert result["metrics"] == [{"type": "loss", "value": 1.0}]


def test_the_card_says_what_was_lost_where_it_was_measured(tmp_path: Path) -> None:
    recipe = load_recipe("llama4_70b_legal")
    about = facts(recipe, tmp_path)
    assert (about["metrics"]["forgetting"], about["metrics"]["safety"]) == ("Forgetting is not shown.", None)
    assert "\n\nForgetting is not shown.\n" in card("Llama-x", recipe, about)


def test_the_base_is_named_by_its_hub_id_and_rows_by_their_card(tmp_path: Path) -> None:
    recipe = load_recipe("llama4_70b_legal")
    about = facts(recipe, tmp_path)
    about["licences"]["rows"] = {
        "card": "legal_licences",
        "title": "Licences",
        "licence": "CC-BY-4.0",
        "attribution": "",
    }
    told = metadata("Llama-x", recipe, about).to_dict()
    assert told["base_model"] == "meta-llama/Llama-4-Scout-17B-16E-Instruct" and told["license"] == "llama4"
    assert told["datasets"] == ["legal_licences"]
    assert "license_name" not in told


def test_a_licence_that_hubs_do_not_know_is_named_and_linked(tmp_path: Path) -> None:
    text = {"LICENSE": "Terms of our own."}
    sha = hashlib.sha256(text["LICENSE"].encode()).hexdigest()
    told = front(
        exported(
            tmp_path, text, model__licence="acme-1.0", licence__accept=sha, model__licence_url="https://a.example/l"
        )
    )
    assert (told["license"], told["license_name"], told["license_link"]) == ("other", "acme-1.0", "https://a.example/l")


def test_a_rehearsal_names_no_base_and_says_what_it_is(tmp_path: Path) -> None:
    recipe = load_recipe("llama4_70b_legal", "scale=rehearsal")
    about = facts(recipe, tmp_path)
    told = metadata("Llama-x", recipe, about).to_dict()
    assert "base_model" not in told and "rehearsal" in told["tags"]
    text = card("Llama-x", recipe, about)
    assert "in rehearsal: a tiny random model" in text and "base: none, its random weights were made here" in text


def test_the_card_shows_rows_compute_result_and_proof(tmp_path: Path) -> None:
    text = (exported(tmp_path) / "README.md").read_text()
    for part in (
        "12 read, 1 dropped, 10 train, 1 heldout",
        "500 tokens",
        "FLOP",
        "Too few rows to say.",
        "mean KL 1.00e-05",
    ):
        assert part in text
    assert "| loss per answer token | 2.000 | 1.000 |" in text


def test_the_text_beside_the_weights_is_carried_into_every_part_of_the_export(tmp_path: Path) -> None:
    folder = exported(tmp_path, {"LICENSE": mit(), "NOTICE.txt": "Thanks to Ann."}, model__licence="mit")
    for part in (folder, folder / "hf", folder / "peft"):
        assert (part / "LICENSE").read_text() == mit()
        assert "Thanks to Ann." in (part / "NOTICE").read_text()
        assert "fine-tuned with LoRA" in (part / "NOTICE").read_text()


def test_the_prescribed_line_the_words_to_show_and_the_policy_stand_in_the_notice(tmp_path: Path) -> None:
    texts = {"LICENSE": LLAMA, "USE_POLICY.md": "Do no harm."}
    folder = exported(tmp_path, texts, model__licence="llama4", export__name="Llama-acme")
    text = (folder / "NOTICE").read_text(encoding="utf-8")
    assert text.splitlines().count(PRESCRIBED) == 1
    assert "\nBuilt with Llama\n" in text and "https://www.llama.com/llama4/use-policy" in text
    assert "trained on what this one writes" in text
    assert (folder / "hf" / "USE_POLICY.md").read_text() == "Do no harm."
    assert (folder / "LICENSE").read_text(encoding="utf-8") == LLAMA


def test_a_licence_that_is_the_same_for_everybody_comes_with_us_and_another_is_asked_for(tmp_path: Path) -> None:
    folder = exported(tmp_path / "a")
    assert (folder / "LICENSE").read_text() == standard_text("apache-2.0") != ""
    folder = exported(tmp_path / "b", model__licence="mit")
    assert not (folder / "LICENSE").exists()
    notice = (folder / "NOTICE").read_text()
    assert "Its text was not beside the weights. Add it as LICENSE before you pass this on: https://" in notice
    told = "the export lacks the text of the base's licence"
    assert f"- {told}: see NOTICE\n" in (folder / "README.md").read_text()
    assert told not in (tmp_path / "a" / "export" / "README.md").read_text()
    (sentence,) = lacking(ready(tmp_path / "b", model__licence="mit"), tmp_path / "b" / "base")
    assert sentence.startswith(f"LIC-009 {told} (MIT License, https://opensource.org/license/mit, read ")
    assert sentence.endswith("before you pass it on: https://opensource.org/license/mit")
    assert lacking(ready(tmp_path / "a"), tmp_path / "a" / "base") == []
    (tmp_path / "b" / "base" / "COPYING").write_text(mit())
    assert lacking(ready(tmp_path / "b", model__licence="mit"), tmp_path / "b" / "base") == []


def test_the_notice_says_that_files_were_changed_and_names_the_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    own = {"data__card": "", "data__train_files": [str(tmp_path / "rows.jsonl")], "licence__of_rows": "CC-BY-4.0"}
    text = (exported(tmp_path, **own) / "NOTICE").read_text()
    assert re.search(
        r"The weights in this folder are changed: m, fine-tuned with LoRA by finetune \S+, exported on 20", text
    )
    assert "rows of the user: the user's own" in text and "licence, as their owner says: CC-BY-4.0" in text


def test_the_bill_of_materials_is_of_the_official_schema_and_names_every_file_by_hash(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    own = {"data__card": "", "data__train_files": [str(tmp_path / "rows.jsonl")], "licence__of_rows": "CC-BY-4.0"}
    folder = exported(tmp_path, **own)
    text = (folder / "bom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text.replace('"machine-learning-model"', '"model"'))
    bom = json.loads(text)
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")  # the schema takes any version
    model = bom["metadata"]["component"]
    told = {part["name"]: part["hashes"][0]["content"] for part in model["components"]}
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert set(told) == set(files) - {"README.md", "bom.cdx.json"}
    assert all(hashlib.sha256(files[name].read_bytes()).hexdigest() == sha for name, sha in told.items())
    base, rows = bom["components"]
    assert [part["name"] for part in base["components"]] == ["config.json", "model.safetensors"]
    assert [part["name"] for part in rows["components"]] == ["rows.jsonl"]
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][1]["value"] == "1"


def test_no_paper_holds_a_path_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    own = {"data__card": "", "data__train_files": [str(tmp_path / "rows.jsonl")]}
    folder = exported(tmp_path, {"LICENSE": mit()}, model__licence="mit", **own)
    papers = ["README.md", "NOTICE", "LICENSE", "bom.cdx.json"]
    assert [name for name in papers if str(tmp_path) in (folder / name).read_text()] == []


def test_an_export_that_a_licence_forbids_is_refused_by_the_stage_itself(tmp_path: Path) -> None:
    trained = run(ready(tmp_path, model__licence="acme-1.0"), until="merge", launch=Stages())
    (tmp_path / "base" / "LICENSE").write_text("Terms of our own.")
    with pytest.raises(RecipeError, match="LIC-007"):
        require_permits(trained, read_recipe(trained.recipe), tmp_path / "base")
    with pytest.raises(RecipeError, match="LIC-007"):
        from finetune.export import export

        export(RunDir(trained.path))
    assert not trained.export.exists()
    assert read_json(trained.path / "inputs.json")
