"""From `model.source` to a folder: made once, checked when opened, made again when damaged."""

import pytest

from finetune.compose import load_recipe
from finetune.errors import FinetuneError, WeightsError
from finetune.source import MANIFEST, base_folder, split_package


def recipe(tmp_path, *words):
    return load_recipe("qwen3_30b_legal", f"cache_dir={tmp_path}", *words)


def test_a_tiny_base_is_made_once_and_found_again(tmp_path):
    first = base_folder(recipe(tmp_path, "scale=rehearsal"))
    stamp = (first / MANIFEST).stat().st_mtime_ns
    assert base_folder(recipe(tmp_path, "scale=rehearsal")) == first
    assert (first / MANIFEST).stat().st_mtime_ns == stamp
    assert base_folder(recipe(tmp_path, "scale=rehearsal", "seed=5")) != first


@pytest.mark.parametrize("damage", ["delete a shard", "flip a byte", "delete the manifest", "cut the tokenizer"])
def test_a_damaged_base_in_the_cache_is_made_again(tmp_path, damage):
    folder = base_folder(recipe(tmp_path, "scale=rehearsal"))
    shard = sorted(folder.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    if damage == "delete a shard":
        shard.unlink()
    elif damage == "flip a byte":
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "delete the manifest":
        (folder / MANIFEST).unlink()
    else:
        (folder / "tokenizer.json").write_text("{")
    assert base_folder(recipe(tmp_path, "scale=rehearsal")) == folder
    assert shard.read_bytes() == whole
    assert len(list((tmp_path / "bases").iterdir())) == 1


def test_a_folder_of_the_user_is_taken_as_it_is(tmp_path):
    (tmp_path / "mine").mkdir()
    assert base_folder(recipe(tmp_path, f"model.source={tmp_path / 'mine'}")) == tmp_path / "mine"


def test_weights_that_are_not_here_are_told_with_a_way_out(tmp_path):
    with pytest.raises(WeightsError, match=r"WGT-001 .*scale=rehearsal"):
        base_folder(recipe(tmp_path, "model.source=/nowhere"))


@pytest.mark.parametrize("source", ["package:x", "package:x==1", "package:==1/f"])
def test_a_package_source_of_another_form_is_told(source):
    with pytest.raises(WeightsError, match="WGT-006"):
        split_package(source)


def test_a_package_without_a_network_is_told(tmp_path):
    with pytest.raises(FinetuneError, match="FET-"):
        base_folder(load_recipe("legal_quickstart", f"cache_dir={tmp_path}", "network=false"))
