"""Tiny models look on disk as the published ones do, load in stock transformers, and run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from finetune.families import FAMILIES, family_of
from finetune.rundir import sha256_tree
from finetune.tiny import published_name, write_tiny

# A tensor of the experts, as the published files name it: a pattern that at least one name must match in full.
PUBLISHED_EXPERTS = {
    "llama4": r"language_model\.model\.layers\.1\.feed_forward\.experts\.gate_up_proj",
    "deepseek_v3": r"model\.layers\.1\.mlp\.experts\.3\.gate_proj\.weight",
    "deepseek_v32": r"model\.layers\.1\.mlp\.experts\.3\.gate_proj\.weight",
    "deepseek_v4": r"layers\.0\.ffn\.experts\.3\.w1\.weight",
    "mistral4": r"model\.layers\.1\.mlp\.experts\.gate_up_proj",
    "qwen3_moe": r"model\.layers\.1\.mlp\.experts\.3\.gate_proj\.weight",
    "qwen3_5_moe": r"model\.language_model\.layers\.0\.mlp\.experts\.gate_up_proj",
    "gpt_oss": r"model\.layers\.0\.mlp\.experts\.gate_up_proj",
    "glm4_moe": r"model\.layers\.1\.mlp\.experts\.3\.gate_proj\.weight",
    "mixtral": r"model\.layers\.0\.block_sparse_moe\.experts\.3\.w1\.weight",
    "olmoe": r"model\.layers\.0\.mlp\.experts\.3\.gate_proj\.weight",
    "granitemoe": r"model\.layers\.0\.block_sparse_moe\.input_linear\.weight",
}
MOE = sorted(PUBLISHED_EXPERTS)
TEXT = "What does the licence permit, forbid or require? Größe, 日本, 12.5 %"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of every family."""
    parent = tmp_path_factory.mktemp("tiny")
    for key, family in FAMILIES.items():
        write_tiny(family, parent / key, seed=3)
    return {key: parent / key for key in FAMILIES}


def index(folder: Path) -> dict[str, str]:
    """Tensor name -> shard."""
    found: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return found


def load(key: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model, by the auto class its family names; nothing may be missing or left over."""
    model, info = getattr(transformers, FAMILIES[key].auto_class).from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info
    return model


def batch(folder: Path) -> dict[str, torch.Tensor]:
    """A chat of two turns as token ids."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": "permissive"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(text, return_tensors="pt").input_ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_every_family_with_experts_has_a_published_name_here() -> None:
    assert [key for key in sorted(FAMILIES) if FAMILIES[key].experts] == MOE
    assert len(MOE) == 12


@pytest.mark.parametrize("key", FAMILIES)
def test_the_config_names_the_family_and_the_tokens(key: str, folders: dict[str, Path]) -> None:
    config = json.loads((folders[key] / "config.json").read_text())
    generation = json.loads((folders[key] / "generation_config.json").read_text())
    assert family_of(config).key == key
    for ids in (config, generation):
        assert (ids["pad_token_id"], ids["bos_token_id"], ids["eos_token_id"]) == (0, 1, 2)


@pytest.mark.parametrize("key", MOE)
def test_experts_are_named_as_published_and_straddle_shards(key: str, folders: dict[str, Path]) -> None:
    names = index(folders[key])
    assert any(re.fullmatch(PUBLISHED_EXPERTS[key], name) for name in names), sorted(names)
    layer = PUBLISHED_EXPERTS[key].partition("experts")[0].partition("input")[0]
    experts = [name for name in names if re.match(layer + r"(experts\.|input_linear\.|output_linear\.)", name)]
    assert len({names[name] for name in experts}) > 1, "a layer's experts must lie in several shards"


@pytest.mark.parametrize("key", FAMILIES)
def test_the_index_is_true_and_weights_are_bf16(key: str, folders: dict[str, Path]) -> None:
    names = index(folders[key])
    dtypes = {}
    for shard in set(names.values()):
        with safe_open(folders[key] / shard, "pt") as tensors:
            assert set(tensors.keys()) == {name for name, place in names.items() if place == shard}
            dtypes |= {name: tensors.get_slice(name).get_dtype() for name, place in names.items() if place == shard}
    odd = {name.rpartition(".")[2]: dtype for name, dtype in dtypes.items() if dtype != "BF16"}
    assert odd.items() <= {"e_score_correction_bias": "F32", "tid2eid": "I64"}.items()


@pytest.mark.parametrize("key", FAMILIES)
def test_a_model_loads_and_saves_under_the_same_names(key: str, folders: dict[str, Path], tmp_path: Path) -> None:
    load(key, folders[key]).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        saved = set(tensors.keys())
    published = set(index(folders[key]))
    # A name that is as published already stays: transformers restores some prefixes of what it loaded, not all.
    assert {name if name in published else published_name(FAMILIES[key], name) for name in saved} == published
    assert len(saved) == len(published)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("key", FAMILIES)
def test_a_model_trains_and_generates(key: str, dtype: torch.dtype, folders: dict[str, Path]) -> None:
    family, inputs = FAMILIES[key], batch(folders[key])
    model = load(key, folders[key], dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=family.mixed_dtypes and dtype is torch.bfloat16):
        model.train()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        model.eval()
        tokens = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert 6 < loss.item() < 8, "the loss of noise over 1024 tokens is about ln 1024 = 6.9"
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 4
    # The indexers of sparse attention only select: no gradient passes a top-k.
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not {name for name in without if ".indexer." not in name}


@pytest.mark.parametrize("key", MOE)
def test_every_expert_is_used(key: str, folders: dict[str, Path]) -> None:
    family, model = FAMILIES[key], load(key, folders[key])
    inputs = batch(folders[key])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    name = f".{family.experts}.{family.expert_parameters[0]}"
    stacks = [parameter for path, parameter in model.named_parameters() if path.endswith(name)]
    assert stacks
    used = torch.stack([stack.grad.flatten(1).any(1) for stack in stacks]).any(0)
    assert used.all(), "an expert that no token reaches would test nothing"


@pytest.mark.parametrize("key", FAMILIES)
def test_the_tokenizer_gives_text_back_and_fits_the_model(key: str, folders: dict[str, Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[key])
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert len(tokenizer) == FAMILIES[key].tiny["vocab_size"] == 1024
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (0, 1, 2)
    assert tokenizer("<|im_end|>").input_ids == [2]


def test_the_chat_template_is_chatml(folders: dict[str, Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["mixtral"])
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(folders: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(99)  # what is drawn elsewhere must not matter
    before = torch.random.get_rng_state()
    write_tiny(FAMILIES["deepseek_v4"], tmp_path / "again", seed=3)
    assert torch.equal(before, torch.random.get_rng_state()), "write_tiny must leave the caller's randomness alone"
    write_tiny(FAMILIES["deepseek_v4"], tmp_path / "other", seed=4)
    first, again, other = (sha256_tree(f) for f in (folders["deepseek_v4"], tmp_path / "again", tmp_path / "other"))
    assert first == again
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {name for name in first if name.startswith("model-")}


def test_the_routing_table_sends_a_token_to_different_experts(folders: dict[str, Path]) -> None:
    model = load("deepseek_v4", folders["deepseek_v4"])
    table = model.get_buffer("model.layers.0.mlp.gate.tid2eid")
    assert (table[:, 0] != table[:, 1]).all()
    assert set(table.unique().tolist()) == {0, 1, 2, 3}
