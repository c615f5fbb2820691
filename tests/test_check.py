"""Everything that can be wrong is said before anything is fetched or written."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune import check, keys, licences, machine, sizes
from finetune.compose import load_recipe, recipe_names
from finetune.families import FAMILIES
from finetune.recipe import Recipe
from tests.job import good

ROOT = Path(__file__).resolve().parent.parent


def only(recipe: Recipe) -> str:
    found = check.problems(recipe)
    assert len(found) == 1, found
    return found[0]


def test_a_good_recipe_has_no_problems() -> None:
    assert check.problems(good()) == []


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("adapter__targets", "everything", "CHK-001 adapter.targets=everything is not one of experts, attention, all"),
        ("train__schedule", "cosin", "CHK-001 train.schedule=cosin"),
        ("adapter__rank", 0, "CHK-002 adapter.rank=0 must be at least 1. Set adapter.rank=1."),
        ("adapter__expert_rank", -1, "CHK-002 adapter.expert_rank"),
        ("train__lr", 0.0, "CHK-002 train.lr=0.0 must be above 0"),
        ("train__lr", math.nan, "CHK-002 train.lr=nan is not a finite number"),
        ("train__lr", math.inf, "CHK-002 train.lr=inf is not a finite number"),
        ("train__warmup_fraction", 1.5, "CHK-002 train.warmup_fraction=1.5 must be at most 1"),
        ("costs__utilisation", 1.1, "CHK-002 costs.utilisation=1.1 must be above 0 and at most 1"),
        ("evaluate__confidence", 1.0, "CHK-002 evaluate.confidence=1.0 must be at least 0 and below 1"),
        ("name", "", "CHK-003 name is empty"),
        ("name", "../up", "CHK-003 name=../up"),
        ("export__name", "a/b", "CHK-003 export.name=a/b"),
        ("model__family", "mixtrall", "MOD-002 model.family=mixtrall does not exist"),
        ("model__family", "", "MOD-001 there is no base model"),
        ("model__config", {}, "MOD-003 model.config is empty"),
        ("model__config", {"vocab_size": 8}, "MOD-003 model.config lacks "),
        ("model__source", "package:a==1/f", "MOD-006 model.sha256=(empty)"),
        ("model__upcycle_experts", 1, "MOD-007 model.upcycle_top_k=2 is larger than model.upcycle_experts=1"),
        ("adapter__dropout", 0.1, "ADP-002 adapter.dropout=0.1 must be 0 when adapter.targets=experts"),
        ("data__card", "", "DAT-001 there are no training rows"),
        ("data__heldout_files", ["tests"], "DAT-003 a data card has its own held-out rows"),
        ("launch__kind", "slurm", "SLM-011 runs_dir='runs' must be an absolute path"),
        ("launch__partition", "gpu", "SLM-015 launch.partition has no effect with launch.kind=local"),
        ("launch__context_parallel", 2, "LCH-013 launch.context_parallel=2 with launch.devices=1"),
        ("launch__nodes", 2, "LCH-009 launch.nodes=2: launch.kind=local starts processes on this machine only"),
        ("train__adapter_of", "best", "TRN-007 train.adapter_of=best needs held-out losses"),
        ("train__allow_changed", ["seed", "sed"], "LCH-003 train.allow_changed: sed is none of base, data, world_size"),
        ("export__formats", ["hf", "onnx"], "EXP-001 export.formats=[hf,onnx]"),
        ("export__formats", [], "EXP-001 export.formats=[]"),
    ],
)
def test_each_wrong_setting_is_named_with_what_to_do(key: str, value: Any, code: str) -> None:
    sentence = only(good(**{key: value}))
    assert sentence.startswith(code)
    assert sentence.rstrip(".").count(".") >= 1  # what is wrong, then what to do


def test_a_package_source_has_a_version_and_a_file() -> None:
    sentence = only(good(model__source="package:thing", model__sha256="0" * 64))
    assert sentence.startswith("MOD-005 model.source=package:thing is not of the form package:NAME==VERSION/FILE")


def test_a_dense_gguf_file_is_only_made_into_experts() -> None:
    source = "package:thing==1/model.gguf"
    sentence = only(good(model__source=source, model__sha256="0" * 64))
    assert sentence.startswith(f"MOD-008 model.upcycle_experts=0 with {source}")
    assert check.problems(good(model__source=source, model__sha256="0" * 64, model__upcycle_experts=4)) == []


def test_dropout_is_allowed_where_no_expert_is_adapted() -> None:
    assert check.problems(good(adapter__dropout=0.1, adapter__targets="attention")) == []


def test_a_dense_family_has_no_experts_and_no_router_to_adapt() -> None:
    recipe = good(model__family="llama", model__config=dict(FAMILIES["llama"].tiny), adapter__router=True)
    assert [p[:7] for p in check.problems(recipe)] == ["ADP-003", "ADP-004"]


def test_all_problems_are_told_at_once() -> None:
    recipe = good(adapter__rank=0, train__lr=-1.0, launch__nodes=4, data__card="", export__formats=["onnx"])
    assert [p[:7] for p in check.problems(recipe)] == ["CHK-002", "CHK-002", "DAT-001", "LCH-009", "EXP-001"]


def test_own_rows_need_files_that_exist_and_held_out_rows(tmp_path: Path) -> None:
    rows, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    rows.write_text("{}\n")
    other.write_text("{}\n")
    own = {"data__card": "", "data__train_files": [str(rows)]}
    assert "DAT-003 there are no held-out rows" in only(good(**own, data__heldout_fraction=0.0))
    assert check.problems(good(**own, data__heldout_fraction=0.2)) == []
    assert check.problems(good(**own, data__heldout_files=[str(other)])) == []
    assert "DAT-004" in only(good(**own, data__heldout_files=[str(tmp_path / "." / "rows.jsonl")]))
    assert "gone.jsonl does not exist" in only(
        good(data__card="", data__train_files=[str(tmp_path / "gone.jsonl")], data__heldout_fraction=0.2)
    )
    assert "its own held-out rows" in only(good(data__heldout_files=[str(other)]))


def test_a_mixture_names_every_file_and_adds_up(tmp_path: Path) -> None:
    rows, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    rows.write_text("{}\n")
    other.write_text("{}\n")
    own = {"data__card": "", "data__train_files": [str(rows), str(other)]}
    assert check.problems(good(**own, data__mixture={str(rows): 0.25, str(other): 0.75})) == []
    assert "DAT-006 data.mixture and data.train_files differ in" in only(good(**own, data__mixture={str(rows): 1.0}))
    assert "adds up to 1.5" in only(good(**own, data__mixture={str(rows): 0.75, str(other): 0.75}))


def test_settings_of_the_data_that_cannot_work_are_told(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    own = {"data__card": "", "data__train_files": [str(rows)]}
    assert "DAT-007 data.benchmarks: keep is not one of" in only(good(**own, data__benchmarks={str(rows): "keep"}))
    assert "data index file=FILE" in only(good(**own, data__benchmarks={str(tmp_path / "gone"): "drop"}))
    assert "DAT-008 data.languages: english" in only(good(**own, data__languages=["english"]))
    assert "DAT-009 data.time_by" in only(good(**own, data__heldout_files=[str(tmp_path)], data__time_by="date"))
    assert "DAT-010 data.group_by" in only(good(data__group_by="document"))
    packed = good(model__family="gpt_oss", model__config=dict(FAMILIES["gpt_oss"].tiny), data__packing=True)
    assert "DAT-011 data.packing=true: rows of gpt_oss" in only(packed)
    assert check.problems(good(data__packing=True)) == []
    assert "DAT-010 data.excerpt_words" in only(good(**own, data__excerpt_words=9))


def test_a_row_may_not_be_longer_than_the_base_can_read() -> None:
    config = dict(FAMILIES["mixtral"].tiny) | {"max_position_embeddings": 1024}
    assert "Set data.max_length=1024." in only(good(model__config=config, data__max_length=4096))
    assert check.problems(good(model__config=config, data__max_length=4096, model__tiny=True)) == []


def test_a_hub_id_is_fetched_by_commit_only() -> None:
    hub = {"model__source": "org/name", "network": True}
    assert only(good(**hub)).startswith("MOD-004 model.revision=(empty)")
    assert only(good(**hub, model__revision="main")).startswith("MOD-004 model.revision=main")
    assert check.problems(good(**hub, model__revision="0123456789abcdef" * 2 + "01234567")) == []


def test_a_licence_that_prescribes_the_name_is_kept() -> None:
    named = [key for key, licence in licences.licences().items() if licence.name_prefix]
    assert named
    for key in named:
        prefix = licences.licences()[key].name_prefix
        assert only(good(model__licence=key)).endswith(f"Set export.name={prefix}-job.")
        assert check.problems(good(model__licence=key, export__name=f"{prefix}-job")) == []


def test_every_licence_says_where_and_when_it_was_read() -> None:
    table = licences.licences()
    assert len(table) >= 8
    for licence in table.values():
        assert licence.source.startswith("https://") and len(licence.date) == 10 and licence.duties
        assert licence.read in ("in full", "summary")


def test_every_number_among_the_settings_has_a_range() -> None:
    known = keys.settings(Recipe)
    ruled = {*check.RANGES, *check.ABOVE_ZERO, *check.BELOW_ONE}
    numbers = {key for key, kind in known.items() if kind in (int, float)}
    assert numbers == ruled


@pytest.mark.slow
def test_every_recipe_checks_at_full_scale_and_as_a_rehearsal() -> None:
    names = recipe_names()
    assert len(names) >= 8
    for name in names:
        for words in ((), ("scale=rehearsal",)):
            recipe = load_recipe(name, *words)
            assert check.problems(recipe) == [], (name, words)
            assert recipe.name == name and recipe.purpose.endswith(".")


def test_every_recipe_file_says_what_was_measured_and_is_short() -> None:
    files = sorted((ROOT / "recipes" / "recipe").rglob("*.yaml"))
    assert len(files) >= 8
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0] == "# @package _global_" and lines[1].startswith("# ")
        assert any(line.startswith("# Measured:") for line in lines), path.name
        assert len(lines) <= 32, path.name


def test_the_large_recipes_end_with_what_is_missing_and_offer_a_rehearsal(tmp_path: Path) -> None:
    recipe = load_recipe("llama4_70b_legal", f"cache_dir={tmp_path}")
    missing = machine.missing_weights(recipe)
    assert missing is not None
    sentence = missing.sentence()
    gib = sizes.weights_gib(recipe.model)
    assert 150 < gib < 260  # 109 B parameters in bf16
    for part in (f"{gib:,.1f} GiB", "safetensors", "Llama 4 Community License", "model.source=/", "scale=rehearsal"):
        assert part in sentence
    assert machine.missing_weights(load_recipe("llama4_70b_legal", "scale=rehearsal")) is None


def test_a_folder_with_weights_is_enough_and_one_without_says_what_it_lacks(tmp_path: Path) -> None:
    recipe = good(model__source=str(tmp_path))
    missing = machine.missing_weights(recipe)
    assert missing is not None and "lacks config.json and *.safetensors" in missing.sentence()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert machine.missing_weights(recipe) is None
    gone = machine.missing_weights(good(model__source=str(tmp_path / "gone")))
    assert gone is not None and "is not a folder" in gone.sentence()


def test_a_package_that_is_not_cached_needs_the_network(tmp_path: Path) -> None:
    package = {"model__source": "package:thing==1.0/f.gguf", "model__sha256": "0" * 64, "cache_dir": str(tmp_path)}
    missing = machine.missing_weights(good(**package))
    assert missing is not None and "network=true" in missing.sentence()
    assert machine.missing_weights(good(**package, network=True)) is None


def test_shapes_are_read_from_the_folder_when_the_card_has_none(tmp_path: Path) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps(dict(FAMILIES["mixtral"].tiny)))
    assert check.problems(good(model__config={}, model__source=str(tmp_path))) == []


def test_too_little_room_is_told_with_both_numbers(tmp_path: Path) -> None:
    recipe = good(runs_dir=str(tmp_path / "runs"), cache_dir=str(tmp_path / "cache"))
    assert machine.place_problems(recipe, run_gib=0.001, cache_gib=0.001) == []
    found = machine.place_problems(recipe, run_gib=4e6, cache_gib=4e6)
    assert len(found) == 1 and found[0].startswith("DSK-001") and "8,000,000.0 GiB" in found[0]  # one disk: their sum


def test_a_place_that_cannot_be_written_is_told_by_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe = good(runs_dir=str(tmp_path / "file" / "runs"), cache_dir=str(tmp_path))
    found = machine.place_problems(recipe, run_gib=0.0, cache_gib=0.0)
    assert len(found) == 1 and found[0].startswith("RUN-001 runs_dir=")


def test_checking_imports_no_torch_and_no_hydra() -> None:
    code = (
        "import sys; from finetune.check import problems; from finetune.recipe import Recipe\n"
        "assert problems(Recipe())\n"
        "assert not {'torch', 'transformers', 'hydra'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_problems_change_nothing() -> None:
    recipe = good(adapter__rank=0)
    before = dataclasses.replace(recipe)
    check.problems(recipe)
    assert recipe == before
