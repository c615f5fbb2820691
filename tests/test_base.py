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


@pytest.mark.parametrize("lost", ["layers.0.block_sparse_moe.experts.2.w1", "layers.1.block_sparse_moe.experts.0.w2"])
def test_an_expert_that_is_missing_is_told(folder, lost):
    for shard in folder.glob("*.safetensors"):
        values = load_file(shard)
        save_file({k: v for k, v in values.items() if lost not in k}, shard, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"WGT-004 .*experts\.\w+ is \(3, .* and \(4, .* by its config\.json"):
        load(folder)


def test_a_whole_part_of_the_experts_that_is_missing_is_told(folder):
    for shard in folder.glob("*.safetensors"):
        values = load_file(shard)
        kept = {k: v for k, v in values.items() if not ("layers.0" in k and ".w3" in k)}
        save_file(kept, shard, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"WGT-004 .*experts\.gate_up_proj is \(0,\) in the checkpoint"):
        load(folder)


def test_double_quantisation_takes_less_and_loads_and_answers_nearly_the_same(folder):
    single = load(folder)
    double = load_base(folder, load_in_4bit=True, precision="bf16", double_quantisation=True)
    for base, size in ((single, 0.5625), (double, 0.5 + 1 / 64)):
        experts = next(m for m in base.model.modules() if hasattr(m, "finetune_layout"))
        count = sum(e * o * i for e, o, i in experts.finetune_layout.shapes.values())
        assert sum(p.numel() * p.element_size() for p in experts.parameters()) / count == pytest.approx(size, rel=0.01)
    assert double.resident_gib < single.resident_gib
    ids = torch.randint(5, 900, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = single.model(input_ids=ids).logits, double.model(input_ids=ids).logits
    assert not torch.equal(a, b)
    assert (a - b).norm() / a.norm() < 0.05


def test_what_loading_took_is_said_with_its_limit(folder):
    line = load(folder).loading()
    assert "GiB in memory" in line
    assert "weights + 2 x the largest group of tensors" in line


@pytest.mark.parametrize("double", [False, True])
def test_a_linear_map_packed_in_pieces_is_what_bitsandbytes_packs_at_once(folder, double, monkeypatch):
    import bitsandbytes as bnb

    monkeypatch.setattr(nf4, "PIECE", 64 * 5)
    base = load_base(folder, load_in_4bit=True, precision="bf16", double_quantisation=double)
    plain = dict(load_base(folder, load_in_4bit=False, precision="bf16").model.named_parameters())
    seen = 0
    for path, module in base.model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = plain[f"{path}.weight"].data.clone()
            theirs = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=double).to("cpu")
            assert torch.equal(module.weight.data, theirs.data)
            ours, expected = module.weight.quant_state.as_dict(), theirs.quant_state.as_dict()
            assert ours.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value, key
            seen += 1
    assert seen >= 8
