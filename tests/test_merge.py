"""Merging into the original files: every family, against the adapter and stock PEFT, and what must be refused."""

import shutil

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from finetune.adapters import attach, load_adapter
from finetune.base import load_base
from finetune.errors import WeightsError
from finetune.families import FAMILIES
from finetune.merge import merge_folder
from finetune.recipe import Adapter
from tests.quantised import quantised
from tests.tiny_models import adapted, checkpoint, some_ids, tensors

ALL = Adapter(targets="all", rank=4, alpha=8.0, expert_rank=3, expert_alpha=5.0)


@pytest.fixture(scope="module")
def adapter_of(tmp_path_factory):
    """family -> (folder of an adapter, ids, the adapted model's logits)."""
    made = {}

    def make(family):
        if family not in made:
            base, model = adapted(family, ALL)
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            ids = some_ids(base)
            with torch.no_grad():
                made[family] = folder, ids, model(input_ids=ids).logits
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_checkpoint_answers_as_the_adapter_does_and_keeps_every_key(family, adapter_of, tmp_path):
    adapter, ids, logits = adapter_of(family)
    source = checkpoint(family, True)
    merge_folder(source, adapter, tmp_path / "merged")
    before, after = tensors(source), tensors(tmp_path / "merged")
    assert list(before) == list(after)
    assert {k: (v.dtype, v.shape) for k, v in before.items()} == {k: (v.dtype, v.shape) for k, v in after.items()}
    assert any(not torch.equal(before[key], after[key]) for key in before)
    model = getattr(transformers, FAMILIES[family].auto_class).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [key for key, family in FAMILIES.items() if not family.repeats_tokens])
def test_it_equals_merge_and_unload_of_stock_peft(family, adapter_of, tmp_path):
    adapter, _, _ = adapter_of(family)
    source = checkpoint(family, True)
    merge_folder(source, adapter, tmp_path / "merged")
    auto = getattr(transformers, FAMILIES[family].auto_class)
    stock = PeftModel.from_pretrained(auto.from_pretrained(source, dtype=torch.float32), adapter).merge_and_unload()
    ours = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_layers_straddle_shards_in_these_checkpoints():
    """The tests above would be weaker without: a layer's experts must lie in more than one file."""
    import json

    index = json.loads((checkpoint("qwen3_moe", True) / "model.safetensors.index.json").read_text())["weight_map"]
    homes = {shard for key, shard in index.items() if ".layers.1.mlp.experts." in key}
    assert len(homes) >= 2


def test_tensors_without_an_update_are_the_same_bytes(adapter_of, tmp_path):
    adapter, _, _ = adapter_of("deepseek_v3")
    source = tmp_path / "base"
    shutil.copytree(checkpoint("deepseek_v3", True), source)
    first = sorted(source.glob("*.safetensors"))[0]
    extra = {"model.layers.61.mtp.weight": torch.randn(3, 5, dtype=torch.float64)}
    save_file(load_file(first) | extra, first, metadata={"format": "pt"})
    merge_folder(source, adapter, tmp_path / "merged")
    before, after = tensors(source), tensors(tmp_path / "merged")
    assert torch.equal(after["model.layers.61.mtp.weight"], extra["model.layers.61.mtp.weight"])
    same = [key for key in before if torch.equal(before[key], after[key])]
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.61.mtp.weight"} <= set(same)


def test_an_adapter_of_another_base_is_refused(adapter_of, tmp_path):
    adapter, _, _ = adapter_of("mixtral")
    with pytest.raises(WeightsError, match="MRG-001"):
        merge_folder(checkpoint("llama", True), adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.iterdir())


def test_an_update_that_finds_only_part_of_its_weight_is_refused(adapter_of, tmp_path):
    adapter, _, _ = adapter_of("mixtral")
    source = tmp_path / "base"
    shutil.copytree(checkpoint("mixtral", True), source)
    for shard in source.glob("*.safetensors"):
        kept = {k: v for k, v in load_file(shard).items() if ".0.block_sparse_moe.experts.1.w3." not in k}
        save_file(kept, shard, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="do not reach the checkpoint whole"):
        merge_folder(source, adapter, tmp_path / "merged")


def test_a_weight_stored_in_eight_bits_takes_no_update(adapter_of, tmp_path):
    adapter, _, _ = adapter_of("mixtral")
    source = tmp_path / "base"
    shutil.copytree(checkpoint("mixtral", True), source)
    for shard in source.glob("*.safetensors"):
        values = load_file(shard)
        values = {k: v.to(torch.float8_e4m3fn) if ".experts." in k else v for k, v in values.items()}
        save_file(values, shard, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="MRG-002"):
        merge_folder(source, adapter, tmp_path / "merged")


@pytest.mark.parametrize("mutation", ["swap gate and up", "drop the scale", "permute B"])
def test_a_scrambled_adapter_is_seen_by_the_comparison(mutation, adapter_of, tmp_path):
    """The parity test can fail: each classic layout mistake moves the merged logits by far more than its tolerance."""
    import json

    adapter, ids, logits = adapter_of("mixtral")
    wrong = tmp_path / "adapter"
    shutil.copytree(adapter, wrong)
    values = load_file(wrong / "adapter_model.safetensors")
    config = json.loads((wrong / "adapter_config.json").read_text())
    for key, value in list(values.items()):
        if ".experts." in key and ".lora_B." in key:
            if mutation == "swap gate and up" and ".base_layer." in key:
                values[key] = value.roll(value.shape[0] // 2, 0).contiguous()
            elif mutation == "permute B":
                values[key] = value.reshape(value.shape[0], -1, 3).mT.reshape(value.shape).contiguous()
    if mutation == "drop the scale":
        config["alpha_pattern"] = dict.fromkeys(config["alpha_pattern"], 3.0)
    save_file(values, wrong / "adapter_model.safetensors", metadata={"format": "pt"})
    (wrong / "adapter_config.json").write_text(json.dumps(config))
    merge_folder(checkpoint("mixtral", True), wrong, tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (model(input_ids=ids).logits - logits).abs().max() > 1e-2


def test_four_bit_training_merges_into_the_original_weights(tmp_path):
    """The adapter of a 4-bit run on the original base equals the merged checkpoint: the NF4 error is not merged in."""
    base, model = adapted("qwen3_moe", ALL, load_in_4bit=True)
    model.save_pretrained(tmp_path / "adapter")
    merge_folder(checkpoint("qwen3_moe", True), tmp_path / "adapter", tmp_path / "merged")
    ids = some_ids(base)
    plain = load_base(checkpoint("qwen3_moe", True), load_in_4bit=False, precision="fp32")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = load_adapter(plain, tmp_path / "adapter").eval()(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v3", "mistral4", "gpt_oss", "deepseek_v4"])
def test_a_base_in_fp8_or_fp4_is_merged_into_bf16_like_its_twin(family, tmp_path):
    """The same numbers as merging the fp32 twin and rounding once; no scale is left, and transformers loads it."""
    import json

    import transformers

    folder, twin = quantised(family, tmp_path)
    base = load_base(folder, load_in_4bit=False, precision="fp32")
    torch.manual_seed(5)
    model = attach(base, Adapter(targets="all", rank=4, expert_rank=3)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
    ids = some_ids(base)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    merge_folder(folder, tmp_path / "adapter", tmp_path / "merged")
    merge_folder(twin, tmp_path / "adapter", tmp_path / "merged-twin")
    found, expected = tensors(tmp_path / "merged"), tensors(tmp_path / "merged-twin")
    assert found.keys() == expected.keys()
    rounded = 0
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key].to(tensor.dtype)), key
        rounded += tensor.dtype == torch.bfloat16
    assert rounded >= 4
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    auto = getattr(transformers, FAMILIES[family].auto_class)
    stock, info = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        difference = stock.eval()(input_ids=ids).logits - logits
    assert difference.norm() <= 2e-2 * logits.norm()
