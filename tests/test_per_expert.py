"""The adapter with a pair per expert is the adapter, expert by expert, for every server's way to scale it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import AdapterError
from finetune.export.per_expert import padded, write_per_expert
from finetune.families import FAMILIES
from finetune.recipe import Adapter
from tests.tiny_models import adapted, checkpoint, tensors

SERVED = [key for key, family in FAMILIES.items() if family.experts and not family.no_served_adapter]
ROOT = "base_model.model."


def saved(key, folder, adapter, whole=True):
    """A PEFT folder whose numbers are small integers, so that products are exact, and its tensors."""
    base, model = adapted(key, adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name and whole:
                parameter.copy_(torch.randint(-4, 5, parameter.shape).float())
    model.save_pretrained(folder)
    return base, load_file(folder / "adapter_model.safetensors")


def expert_updates(family, fused, scale, rank):
    """{(layer module, expert, map): update}, by the definition of PEFT's layout since 0.19.1, of the fused file."""
    found = {}
    stacks = {k.removesuffix(".lora_A.weight") for k in fused if f".{family.experts}." in k and "lora_A" in k}
    for key in stacks:
        a, b = fused[f"{key}.lora_A.weight"], fused[f"{key}.lora_B.weight"]
        experts = a.shape[0] // rank
        first = key.endswith(".base_layer")
        for e in range(experts):
            update = scale * b[:, e::experts] @ a[e * rank : (e + 1) * rank]
            if family.transposed and not family.interleaved:  # stored (in, out), and not marked so: d1 is the input
                update = update.T
            if not first:
                parts = {"down": update}
            elif family.interleaved:
                parts = {"gate": update[0::2], "up": update[1::2]}
            else:
                parts = dict(zip(("gate", "up"), update.chunk(2), strict=True))
            layer = int(key.split("layers.")[1].split(".")[0])
            found |= {(layer, e, name): part for name, part in parts.items()}
    return found


@pytest.mark.parametrize("key", SERVED)
def test_every_experts_product_is_the_update_of_the_fused_file_and_the_pairs_make_that_file_again(key, tmp_path):
    family = FAMILIES[key]
    settings = Adapter(rank=4, alpha=8.0, expert_rank=4, expert_alpha=8.0, load_in_4bit=False)
    _, fused = saved(key, tmp_path / "peft", settings)
    write_per_expert(checkpoint(key, fp32=True), tmp_path / "peft", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    pairs = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert config["target_parameters"] is None and not config["rank_pattern"] and config["r"] == 4
    names = dict(zip(family.expert_names, ("gate", "up", "down"), strict=True))
    assert set(config["target_modules"]) >= set(names)
    scale, read = config["lora_alpha"] / config["r"], {}
    for key_a in [k for k in pairs if k.endswith(".lora_A.weight") and k.split(".")[-4].isdigit()]:
        *_, number, word, _, _ = key_a.split(".")
        layer = int(key_a.split("layers.")[1].split(".")[0])
        read[layer, int(number), names[word]] = pairs[key_a], pairs[key_a.replace("lora_A", "lora_B")]
    wanted = expert_updates(family, fused, scale, 4)
    assert read.keys() == wanted.keys() and len(wanted) % 3 == 0
    for place, (a, b) in read.items():
        assert torch.equal(scale * b @ a, wanted[place]), place
        assert torch.equal(read[place[0], place[1], "gate"][0], read[place[0], place[1], "up"][0])
    others = [k for k in fused if f".{family.experts}." not in k]
    assert len(others) + 2 * len(read) == len(pairs)
    whole = {(k.split("layers.")[1], v.numpy().tobytes()) for k, v in pairs.items()}
    assert {(k.split("layers.")[1], fused[k].numpy().tobytes()) for k in others} <= whole


@pytest.mark.parametrize("key", [k for k in SERVED if not FAMILIES[k].published_fused])
def test_the_keys_are_those_of_the_published_files_where_these_have_a_matrix_per_expert(key, tmp_path):
    on_disk = tensors(checkpoint(key, fp32=True))
    if not any(".experts.0." in name for name in on_disk):
        pytest.skip("published as stacks")
    saved(key, tmp_path / "peft", Adapter(rank=2, expert_rank=2, load_in_4bit=False))
    write_per_expert(checkpoint(key, fp32=True), tmp_path / "peft", tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    modules = {name.removeprefix(ROOT).split(".lora_")[0] + ".weight" for name in found}
    assert any(".experts.0." in name for name in modules)
    assert modules <= set(on_disk)


def test_other_ranks_and_scales_become_one_of_each_and_no_product_changes(tmp_path):
    settings = Adapter(rank=8, alpha=16.0, expert_rank=2, expert_alpha=1.0, load_in_4bit=False)
    base, fused = saved("qwen3_moe", tmp_path / "peft", settings)
    done = write_per_expert(checkpoint("qwen3_moe", fp32=True), tmp_path / "peft", tmp_path / "out")
    pairs = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ranks = {tensor.shape[0] for name, tensor in pairs.items() if "lora_A" in name}
    assert ranks == {8} and done["rank"] == 8
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / 8
    wanted = expert_updates(base.family, fused, 0.5, 2)
    place = f"{ROOT}model.layers.1.mlp.experts.3.up_proj"
    assert torch.equal(scale * pairs[f"{place}.lora_B.weight"] @ pairs[f"{place}.lora_A.weight"], wanted[1, 3, "up"])
    name = f"{ROOT}model.layers.1.self_attn.q_proj"
    one, two = (d[f"{name}.lora_B.weight"] @ d[f"{name}.lora_A.weight"] for d in (fused, pairs))
    assert torch.equal(2.0 * one, scale * two)


def test_zeros_change_no_product():
    a, b = torch.randn(2, 5), torch.randn(3, 2)
    wide_a, wide_b = padded(a, b, 7)
    assert wide_a.shape == (7, 5) and wide_b.shape == (3, 7)
    assert torch.equal(wide_a[:2], a) and torch.equal(wide_b[:, :2], b)
    assert not wide_a[2:].any() and not wide_b[:, 2:].any()


def test_what_servers_cannot_apply_is_refused(tmp_path):
    saved("qwen3", tmp_path / "dora", Adapter(rank=2, method="dora", targets="all", load_in_4bit=False), whole=False)
    with pytest.raises(AdapterError, match="ADP-017 .* servers know no DoRA"):
        write_per_expert(checkpoint("qwen3", fp32=True), tmp_path / "dora", tmp_path / "out")
    saved("deepseek_v4", tmp_path / "v4", Adapter(rank=2, expert_rank=2, load_in_4bit=False))
    with pytest.raises(AdapterError, match="ADP-017 .* no server takes an adapter for them"):
        write_per_expert(checkpoint("deepseek_v4", fp32=True), tmp_path / "v4", tmp_path / "out")
    assert not (tmp_path / "out").exists()
