"""Loading a base: what is packed, what it costs while loading, and every damaged folder as one sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.base import load_base
from finetune.errors import WeightsError
from finetune.experts import nf4
from finetune.families import FAMILIES
from tests.tiny_models import checkpoint


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder that a test may damage."""
    shutil.copytree(checkpoint("mixtral"), tmp_path / "base")
    return tmp_path / "base"


def load(folder):
    return load_base(folder, load_in_4bit=True, precision="bf16")


@pytest.mark.parametrize("family", [key for key, family in FAMILIES.items() if family.experts])
def test_every_expert_is_packed_to_the_bits_of_packing_it_alone(family):
    plain = load_base(checkpoint(family), load_in_4bit=False, precision="bf16").model
    packed = load_base(checkpoint(family), load_in_4bit=True, precision="bf16").model
    stacks = dict(plain.named_parameters())
    seen = 0
    for path, module in packed.named_modules():
        if not hasattr(module, "finetune_layout"):
            continue
        for name in module.finetune_layout.shapes:
            for suffix, part in nf4.pack(stacks[f"{path}.{name}"].data).items():
                assert torch.equal(getattr(module, name + suffix), part)
            assert getattr(module, name).dtype == torch.uint8
            seen += 1
    assert seen >= 2
    assert not any(p.requires_grad for p in packed.parameters())


def test_a_folder_without_a_config_is_no_model(tmp_path):
    with pytest.raises(WeightsError, match=r"WGT-001 .* has no config\.json"):
        load(tmp_path)


def test_a_config_that_is_no_json_is_told(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="WGT-002"):
        load(folder)


def test_an_architecture_of_no_family_is_told_with_those_there_are(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(WeightsError, match=r"FAM-001 model_type 'gpt2' .* known model types: .*mixtral"):
        load(folder)


def test_a_shard_that_the_index_names_and_nobody_has_is_told(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(WeightsError, match=r"WGT-003 .*model-00002-of-.*\.safetensors is missing"):
        load(folder)


def test_an_index_that_points_out_of_the_folder_is_refused(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    path.write_text(json.dumps(index))
    (folder.parent / "elsewhere.safetensors").write_bytes(b"x")
    with pytest.raises(WeightsError, match="WGT-003"):
        load(folder)


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_shard_that_is_cut_short_is_told(folder, keep):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * keep)])
    with pytest.raises(WeightsError, match=r"WGT-003 .*cut short or damaged"):
        load(folder)


def test_a_header_that_is_no_json_is_told(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[8:40] = b"\xff" * 32
    shard.write_bytes(content)
    with pytest.raises(WeightsError, match=r"WGT-003 .*cut short or damaged"):
        load(folder)


def test_a_weight_that_is_missing_is_told(folder):
    shard = next(s for s in sorted(folder.glob("*.safetensors")) if "model.norm.weight" in load_file(s))
    values = load_file(shard)
    del values["model.norm.weight"]
    save_file(values, shard, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"WGT-005 .*1 missing keys, e\.g\. model\.norm\.weight"):
        load(folder)


def test_a_weight_that_no_layer_has_is_told(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    save_file(load_file(shard) | {"model.layers.0.odd.weight": torch.zeros(3)}, shard, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"WGT-005 .*1 unexpected keys, e\.g\. model\.layers\.0\.odd\.weight"):
        load(folder)


@pytest.mark.parametrize("part", ["experts", "self_attn.q_proj", "norm"])
def test_a_shape_that_disagrees_with_the_config_is_told(folder, part):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if part == "experts":
        config["intermediate_size"] *= 2
    elif part == "self_attn.q_proj":
        config["num_attention_heads"] *= 2
    else:
        config["hidden_size"] *= 2
    path.write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"WGT-00[45] "):
        load(folder)
