"""The export is what the merge has proved, its clients say so, and it holds no held-out rows."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import GateError, RunError
from finetune.export import export, link_tree
from finetune.parity import Parity
from finetune.rundir import RunDir, read_json, sha256_file, write_json


@pytest.fixture
def merged(merged_run, tmp_path):
    """A copy of a run that has been merged and not exported."""
    copy = RunDir(tmp_path / "run")
    shutil.copytree(merged_run[0].path, copy.path)
    return copy


def test_an_export_holds_the_model_the_adapter_the_proof_and_a_card(merged):
    export(merged)
    names = {path.name for path in merged.export.iterdir()}
    assert names == {"hf", "peft", "parity.json", "clients.json", "README.md", "LICENSE", "NOTICE", "bom.cdx.json"}
    told = read_json(merged.export / "clients.json")
    assert [(entry["format"], entry["client"], entry["asked"]) for entry in told["clients"]] == [
        ("hf", "transformers", True),
        ("peft", "peft", True),
    ]
    for entry in told["clients"]:
        assert entry["same_first"] == entry["same_text"] == 1.0 and entry["mean_gap"] < 1e-3 and entry["tokens"] >= 2
    assert told["formats"]["hf"]["tokenizer"]["chats"] == 5
    assert told["formats"]["hf"]["tokenizer"]["end_of_turn"] == "<|im_end|>"
    assert told["formats"]["hf"]["fields_added"] == ["max_window_layers", "num_experts", "rope_theta"]
    assert read_json(merged.export / "parity.json") == read_json(merged.parity)
    assert not {"parity.json", "answers.json"} & {path.name for path in (merged.export / "hf").iterdir()}
    assert merged.answers.is_file()
    card = (merged.export / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card.split("---")[1]
    assert "in rehearsal" in card
    assert Parity.read(merged.parity).sentence() in card


def test_a_merged_file_that_answers_as_something_else_is_not_exported(merged, tmp_path):
    shard = sorted(merged.merged.glob("*.safetensors"))[0]
    values = {key: torch.randn_like(value) for key, value in load_file(shard).items()}
    save_file(values, shard, metadata={"format": "pt"})
    note = merged.merged / "merge.json"
    told = read_json(note)
    write_json(note, told | {"sha256": told["sha256"] | {shard.name: sha256_file(shard)}})  # as if it were proved
    with pytest.raises(GateError, match=r"EXP-030 hf in transformers"):
        export(merged)
    assert merged.adapter.exists() and not merged.export.exists()
    assert not list(merged.path.glob(".partial-*"))


def test_an_adapter_per_expert_and_a_start_line_are_exported_beside_a_note_of_what_was_not_asked(merged, monkeypatch):
    monkeypatch.setattr("finetune.export.asked.found", list)
    recipe = merged.recipe.read_text()
    merged.recipe.write_text(recipe.replace("  - peft\n", "  - peft_per_expert\n  - vllm\n", 1))
    export(merged)
    assert {path.name for path in (merged.export / "peft_per_expert").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "LICENSE",
        "NOTICE",
    }
    assert os.access(merged.export / "vllm" / "start.sh", os.X_OK)
    told = {entry["format"]: entry for entry in read_json(merged.export / "clients.json")["clients"]}
    assert told["hf"]["asked"] and not told["vllm"]["asked"] and not told["peft_per_expert"]["asked"]
    assert "vllm was not asked" in (merged.export / "README.md").read_text()


def test_an_adapter_per_expert_is_asked_in_vllm_also_where_llama_cpp_gets_it(merged, monkeypatch):
    class Tool:
        log = merged.logs / "converter.log"

        def model(self, source, target, kind, family):
            target.write_bytes(b"GGUF")

        def adapter(self, base, source, target, family):
            target.parent.mkdir()
            target.write_bytes(b"GGUF")

    monkeypatch.setattr("finetune.export.asked.found", list)
    monkeypatch.setattr("finetune.export._converter", lambda job: Tool())
    recipe = merged.recipe.read_text().replace("  - peft\n", "  - peft_per_expert\n", 1)
    merged.recipe.write_text(recipe.replace("gguf_adapter: false", "gguf_adapter: true"))
    export(merged)
    told = read_json(merged.export / "clients.json")["clients"]
    asked = [(entry["format"], entry["client"], entry["asked"]) for entry in told]
    assert ("peft_per_expert", "vllm", False) in asked and ("peft_per_expert as GGUF", "llama.cpp", False) in asked
    assert "- peft_per_expert: vllm was not asked: " in (merged.export / "README.md").read_text()


@pytest.mark.parametrize("name", ["merged", "adapter"])
def test_a_byte_that_changed_after_the_proof_is_not_exported(name, merged):
    path = sorted((merged.path / name).glob("*.safetensors"))[-1]
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(RunError, match=rf"MRG-015 not what the merge has proved: {name}/{path.name} has changed"):
        export(merged)
    assert not merged.export.exists() and not list(merged.path.glob(".partial-*"))


def test_the_merge_notes_a_hash_of_every_file_that_it_proved(merged):
    told = read_json(merged.merged / "merge.json")
    found = {path.name for path in merged.merged.iterdir()} - {"merge.json"}
    assert set(told["sha256"]) == found and {"config.json", "parity.json", "answers.json"} < found
    assert set(told["trained"]) == {path.name for path in merged.adapter.iterdir()}


def test_without_a_proof_there_is_no_export(merged):
    merged.parity.unlink()
    with pytest.raises(RunError, match="RUN-002"):
        export(merged)
    assert not merged.export.exists()


def test_linked_folders_share_bytes_where_they_can_and_copy_where_not(tmp_path, monkeypatch):
    source = tmp_path / "a"
    source.mkdir()
    (source / "x").write_text("1")
    link_tree(source, tmp_path / "b")
    assert (tmp_path / "b" / "x").samefile(source / "x")

    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    link_tree(source, tmp_path / "c")
    assert (tmp_path / "c" / "x").read_text() == "1"
    assert not (tmp_path / "c" / "x").samefile(source / "x")
