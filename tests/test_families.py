"""The families describe the models that transformers builds, weight by weight; cards add up to the published sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.errors import WeightsError
from finetune.families import FAMILIES, GROUPS, Family, Matrix, family_of
from finetune.recipe import Model

CARDS = sorted((Path(__file__).parents[1] / "recipes" / "model").rglob("*.yaml"))

# Name of a card -> billions of parameters as published, and where that is said.
PUBLISHED = {
    "deepseek_v3": (671, "github.com/deepseek-ai/DeepSeek-V3 README"),
    "deepseek_v4": (284, "DeepSeek-V4 technical report, abstract: 284B parameters, 13B activated"),
    "deepseek_v4_pro": (1600, "DeepSeek-V4 technical report, abstract: 1.6T parameters, 49B activated"),
    "glm4_moe": (106, "huggingface.co/zai-org/GLM-4.5 README"),
    "gpt_oss_120b": (116.8, "gpt-oss model card, arXiv 2508.10925: 116.8B"),
    "gpt_oss_20b": (20.9, "gpt-oss model card, arXiv 2508.10925: 20.9B"),
    "granite_3b_a800m": (3.3, "huggingface.co/ibm-granite/granite-3.1-3b-a800m-base: 6.6 GB of bf16 files"),
    "llama4_maverick": (400, "Meta's announcement of Llama 4, 5 April 2025 (with the vision part)"),
    "llama4_scout": (109, "Meta's announcement of Llama 4, 5 April 2025 (with the vision part)"),
    "mistral_large3": (673, "huggingface.co/mistralai/Mistral-Large-3-675B-Instruct-2512: 673B text + 2.5B vision"),
    "mixtral_8x7b": (46.7, "ollama.com/library/mixtral:8x7b: 46.7B"),
    "olmoe": (6.92, "huggingface.co/allenai/OLMoE-1B-7B-0924-GGUF: 6.92B"),
    "qwen3_235b": (235, "huggingface.co/Qwen/Qwen3-235B-A22B: 235B"),
    "qwen3_30b": (30.5, "huggingface.co/Qwen/Qwen3-30B-A3B: 30.5B"),
    "qwen3_5_35b": (35, "huggingface.co/Qwen/Qwen3.5-35B-A3B: 35B (text part)"),
    "smollm2_moe": (0.373, "134.5M parameters, of which 79.6M are MLPs that stand four times, and 69k of routers"),
}


def card(path: Path) -> Model:
    """The card as the recipe reads it; an unknown key is an error."""
    return Model(**yaml.safe_load(path.read_text(encoding="utf-8")))


def weights(matrices: list[Matrix]) -> Counter[str]:
    """Parameters by name, without the kinds that a config has none of."""
    count: Counter[str] = Counter()
    for matrix in matrices:
        count[matrix.name] += matrix.parameters
    return +count


def meta_model(family: Family, config: Mapping[str, Any]) -> Any:
    """The transformers model of a config, without memory for its weights."""
    import torch
    import transformers

    fields = dict(config)
    with torch.device("meta"):
        return getattr(transformers, family.auto_class).from_config(
            transformers.AutoConfig.for_model(fields.pop("model_type"), **fields), dtype=torch.bfloat16
        )


def weights_of_model(model: Any) -> Counter[str]:
    """Parameters of a model by name below its layer, as families name them."""
    count: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        name = name.removesuffix(".weight").removeprefix("model.")
        count[name.split(".", 2)[2] if name.startswith("layers.") else name] += parameter.numel()
    return count


def test_there_are_thirteen_families_under_their_keys() -> None:
    assert len(FAMILIES) == 13
    assert all(family.key == key for key, family in FAMILIES.items())
    types = [name for family in FAMILIES.values() for name in family.model_types]
    assert len(types) == len(set(types))


@pytest.mark.parametrize("key", FAMILIES)
def test_the_matrices_of_a_tiny_config_are_the_weights_of_its_model(key: str) -> None:
    family = FAMILIES[key]
    model = meta_model(family, family.tiny)
    matrices = family.matrices(family.tiny)
    assert weights(matrices) == weights_of_model(model)
    assert sum(matrix.parameters for matrix in matrices) == model.num_parameters()
    assert {matrix.group for matrix in matrices} <= set(GROUPS)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_the_matrices_of_a_card_are_the_weights_of_the_full_model(path: Path) -> None:
    model = card(path)
    family = FAMILIES[model.family]
    built = meta_model(family, model.config)
    matrices = family.matrices(model.config)
    assert weights(matrices) == weights_of_model(built)
    assert sum(matrix.parameters for matrix in matrices) == built.num_parameters()


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_card_adds_up_to_the_published_size(path: Path) -> None:
    model = card(path)
    total = sum(matrix.parameters for matrix in FAMILIES[model.family].matrices(model.config))
    billions, source = PUBLISHED[path.stem]
    assert total / 1e9 == pytest.approx(billions, rel=0.02), source


def test_every_card_is_complete() -> None:
    assert len(CARDS) == len(PUBLISHED) == 16
    for path in CARDS:
        model = card(path)
        assert model.name == path.stem
        assert family_of(model.config).key == model.family
        for name in ("title", "source", "licence", "licence_url", "facts_source", "note"):
            assert getattr(model, name), f"{path.name}: {name} is empty"
        assert model.facts_date == "2026-11-23"
        assert bool(model.sha256) == model.source.startswith("package:")


@pytest.mark.parametrize("key", FAMILIES)
def test_the_names_of_a_family_are_modules_of_its_model(key: str) -> None:
    import torch

    family = FAMILIES[key]
    modules = {
        name.split(".", 3)[3]: module
        for name, module in meta_model(family, family.tiny).named_modules()
        if name.count(".") > 2
    }
    present = [name for name in family.attention if name in modules]
    assert len(present) >= 4
    for name in (*present, *family.shared, *family.dense):
        assert isinstance(modules[name], torch.nn.Linear), name
        assert type(modules[name]) is torch.nn.Linear, f"{name} is a special linear map: a plain LoRA may be wrong"
    assert bool(family.experts) == bool(family.router)
    if family.experts:
        experts = modules[family.experts]
        assert type(experts).__name__ == family.experts_class
        stacks = [name for name, parameter in experts.named_parameters() if parameter.dim() == 3]
        assert tuple(stacks) == family.expert_parameters
        hidden = family.tiny["hidden_size"]
        gate_up = experts.get_parameter(family.expert_parameters[0])
        assert (gate_up.shape[1] == hidden) == family.transposed
        assert family.router in modules
        common = hasattr(experts, "is_concatenated")  # set by transformers where experts follow the common interface
        assert family.repeats_tokens == (not common)
        assert family.interleaved == (common and not experts.is_concatenated)


@pytest.mark.parametrize("key", FAMILIES)
def test_the_block_class_is_the_class_of_a_layer(key: str) -> None:
    family = FAMILIES[key]
    layers = meta_model(family, family.tiny).model.layers
    assert {type(layer).__name__ for layer in layers} == {family.block_class}


def test_a_multimodal_config_belongs_to_the_family_of_its_text_part() -> None:
    text = {"model_type": "mistral4"}
    assert family_of({"model_type": "mistral3", "text_config": text}).key == "mistral4"
    assert family_of({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}).key == "llama4"
    assert FAMILIES["mistral4"].text_part({"model_type": "mistral3", "text_config": text}) == text


def test_an_unknown_model_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(WeightsError, match=r"FAM-001 .*'gpt2'.*deepseek_v3.*qwen3_moe"):
        family_of({"model_type": "gpt2"})


def test_one_token_uses_top_k_of_the_experts() -> None:
    path = next(path for path in CARDS if path.stem == "qwen3_30b")
    routed = [m for m in FAMILIES["qwen3_moe"].matrices(card(path).config) if m.group == "routed"]
    assert sum(m.parameters for m in routed) == 16 * sum(m.active_parameters for m in routed)


def test_compressed_attention_counts_as_the_published_tensor_listing_does() -> None:
    """Sizes of DeepSeek-V4-Flash tensors as listed from its files: 41 compressors, 21 of them with an indexer."""
    path = next(path for path in CARDS if path.stem == "deepseek_v4")
    count = weights(FAMILIES["deepseek_v4"].matrices(card(path).config))
    assert count["self_attn.compressor.kv_proj"] == 21 * 1024 * 4096 + 20 * 512 * 4096
    assert count["self_attn.compressor.position_bias"] == 21 * 4 * 1024 + 20 * 128 * 512
    assert count["self_attn.compressor.kv_norm"] == 41 * 512
    assert count["self_attn.compressor.indexer.q_b_proj"] == 21 * 8192 * 1024
    assert count["self_attn.o_a_proj"] == 43 * 8192 * 4096
    assert count["attn_hc.fn"] == 43 * 24 * 16384
    assert count["mlp.experts.down_proj"] == 43 * 256 * 4096 * 2048


def test_the_families_need_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, finetune.families; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
