"""The families describe the models that transformers builds, weight by weight; cards add up to the published sizes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.errors import WeightsError
from finetune.families import FAMILIES, GROUPS, Family, Matrix, family_of
from finetune.licences import find_licence
from finetune.recipe import Adapter, Model
from tests.tiny_models import checkpoint, tensors

CARDS = sorted((Path(__file__).parents[1] / "recipes" / "model").rglob("*.yaml"))

# Name of a card -> billions of parameters as published, and where that is said.
PUBLISHED = {
    "deepseek_v3": (671, "github.com/deepseek-ai/DeepSeek-V3 README"),
    "deepseek_v32": (672, "deepseek3.2-671b.yml of maxtext: V3's 671B and an indexer of 14M in each of 61 layers"),
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


def test_there_are_fourteen_families_under_their_keys() -> None:
    assert len(FAMILIES) == 14
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


@pytest.mark.parametrize(("key", "field"), [*((key, "attention_bias") for key in FAMILIES), ("llama", "mlp_bias")])
def test_biases_are_counted_where_a_config_asks_for_them(key: str, field: str) -> None:
    config = dict(FAMILIES[key].tiny) | {field: True}
    assert weights(FAMILIES[key].matrices(config)) == weights_of_model(meta_model(FAMILIES[key], config))


def test_the_licence_of_a_family_has_rules() -> None:
    named = [family.licence for family in FAMILIES.values() if family.licence]
    assert len(named) == 13, "what shares the llama layout has as many licences as publishers"
    assert all(find_licence(key) for key in named)


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
    assert len(CARDS) == len(PUBLISHED) == 17
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


@pytest.mark.parametrize("model_type", ["internlm", "internlm2", "internlm3"])
def test_a_folder_that_must_be_converted_is_refused_with_what_to_do(model_type: str) -> None:
    with pytest.raises(
        WeightsError, match=rf"FAM-002 .*'{model_type}'.* never run here\. Try: .*model\.source"
    ) as error:
        family_of({"model_type": model_type, "auto_map": {"AutoConfig": "configuration.Config"}})
    assert "\n" not in error.value.sentence()


def test_doing_what_the_refusal_says_gives_a_folder_that_loads(tmp_path: Path) -> None:
    """InternLM3 has Llama's tensors under Llama's names, biases by two switches, and a rope that grows with length."""
    import torch
    import transformers

    from finetune.base import load_base

    rope = {"rope_theta": 50000000, "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}}
    fields = dict(FAMILIES["llama"].tiny) | rope | {"attention_bias": True, "mlp_bias": True}
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    stock = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    stock.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(checkpoint("llama")).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    published = json.loads(file.read_text()) | rope | {"model_type": "internlm3", "qkv_bias": True, "bias": True}
    published = {k: v for k, v in published.items() if k not in ("attention_bias", "mlp_bias", "rope_parameters")}
    file.write_text(json.dumps(published | {"auto_map": {"AutoConfig": "configuration_internlm3.InternLM3Config"}}))
    with pytest.raises(
        WeightsError, match=r"FAM-002 .*attention_bias and mlp_bias with the values of qkv_bias and bias"
    ):
        load_base(tmp_path, load_in_4bit=False, precision="fp32")

    done = published | {"model_type": "llama", "attention_bias": True, "mlp_bias": True}
    file.write_text(json.dumps(done))
    base = load_base(tmp_path, load_in_4bit=False, precision="fp32")
    assert base.family.key == "llama"
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(base.model(input_ids=ids).logits, stock(input_ids=ids).logits)


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


def test_an_indexer_that_chooses_few_tokens_answers_as_stock_and_gets_no_gradient(tmp_path: Path) -> None:
    import torch
    import transformers

    from finetune.base import load_base

    folder = tmp_path / "base"
    shutil.copytree(checkpoint("deepseek_v32", True), folder)
    whole = load_base(folder, load_in_4bit=False, precision="fp32").model
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"index_topk": 4}))
    model = load_base(folder, load_in_4bit=False, precision="fp32").model
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-4, atol=1e-5)
    difference = (logits(model) - logits(whole)).abs().amax(-1)[0]
    assert difference[:4].max() < 1e-5 < 1e-2 < difference[4:].max(), (
        "rows of up to index_topk tokens are attended whole"
    )

    ids = torch.tensor([list(IDS)])
    stock(input_ids=ids, labels=ids).loss.backward()
    indexer = {name for name, _ in stock.named_parameters() if ".indexer." in name}
    assert len(indexer) == 2 * 5
    assert {name for name, p in stock.named_parameters() if p.grad is None} == indexer


GQA = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
MLA = "self_attn.q_a_proj self_attn.q_b_proj self_attn.kv_a_proj_with_mqa self_attn.kv_b_proj self_attn.o_proj"
V4 = "self_attn.q_a_proj self_attn.q_b_proj self_attn.kv_proj self_attn.o_b_proj"
DELTA = "linear_attn.in_proj_qkv linear_attn.in_proj_z linear_attn.out_proj"
STACKS = "mlp.experts.gate_up_proj mlp.experts.down_proj"
MLP = "mlp.gate_proj mlp.up_proj mlp.down_proj"
SHARED = "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj mlp.shared_experts.down_proj"

# Family -> (layers of its tiny model, attention, experts, what targets=all adds), as read in transformers 5.17's
# modeling files. By hand: a list made from the family would prove nothing about it.
ADAPTED = {
    "llama4": [
        ("0 2", GQA, "", "feed_forward.gate_proj feed_forward.up_proj feed_forward.down_proj"),
        (
            "1 3",
            GQA,
            "feed_forward.experts.gate_up_proj feed_forward.experts.down_proj",
            "feed_forward.shared_expert.gate_proj feed_forward.shared_expert.up_proj"
            " feed_forward.shared_expert.down_proj",
        ),
    ],
    "deepseek_v3": [("0", MLA, "", MLP), ("1", MLA, STACKS, SHARED)],
    "deepseek_v32": [("0", MLA, "", MLP), ("1", MLA, STACKS, SHARED)],
    "deepseek_v4": [("0 1 2", V4, STACKS, SHARED)],
    "mistral4": [("0", MLA, "", MLP), ("1", MLA, STACKS, SHARED)],
    "qwen3_moe": [("0", GQA, "", MLP), ("1 2", GQA, STACKS, "")],
    "qwen3_5_moe": [
        (
            "0",
            DELTA,
            STACKS,
            "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.shared_expert.down_proj",
        ),
        (
            "1",
            GQA,
            STACKS,
            "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.shared_expert.down_proj",
        ),
    ],
    "gpt_oss": [("0 1", GQA, STACKS, "")],
    "glm4_moe": [("0", GQA, "", MLP), ("1", GQA, STACKS, SHARED)],
    "mixtral": [("0 1", GQA, STACKS, "")],
    "olmoe": [("0 1", GQA, STACKS, "")],
    "granitemoe": [
        ("0 1", GQA, "block_sparse_moe.experts.gate_up_proj block_sparse_moe.experts.down_proj", ""),
    ],
    "llama": [("0 1", GQA, "", MLP)],
    "qwen3": [("0 1", GQA, "", MLP)],
}


def test_every_family_has_its_list_of_adapted_weights() -> None:
    assert list(ADAPTED) == list(FAMILIES)
    for key, kinds in ADAPTED.items():
        layers = sorted(int(layer) for numbers, *_ in kinds for layer in numbers.split())
        assert layers == list(range(FAMILIES[key].tiny["num_hidden_layers"])), key


@pytest.mark.parametrize("targets", ["attention", "experts", "all"])
@pytest.mark.parametrize("key", FAMILIES)
def test_exactly_the_listed_weights_of_every_layer_are_adapted(key: str, targets: str) -> None:
    from finetune.adapters import adapted_parameters, attach
    from finetune.base import load_base

    base = load_base(checkpoint(key), load_in_4bit=False, precision="bf16")
    found = adapted_parameters(attach(base, Adapter(targets=targets, rank=1, expert_rank=1)))
    expected = set()
    for layers, attention, experts, others in ADAPTED[key]:
        names = f"{attention} {experts if targets != 'attention' else ''} {others if targets == 'all' else ''}"
        expected |= {f"model.layers.{layer}.{name}" for layer in layers.split() for name in names.split()}
    assert {name.removesuffix(".weight") for name in found} == expected


# Family -> (model type of its multimodal config, a vision part of one layer, prefixes of the vision tensors on disk).
MULTIMODAL: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama4": (
        "llama4",
        {
            "model_type": "llama4_vision_model",
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        ("vision_model.", "multi_modal_projector."),
    ),
    "mistral4": (
        "mistral3",
        {
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
            "image_size": 28,
            "patch_size": 14,
        },
        ("vision_tower.", "multi_modal_projector."),
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        {
            "model_type": "qwen3_5_moe_vision",
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "num_position_embeddings": 16,
        },
        ("model.visual.",),
    ),
}
IDS = range(5, 45)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """family -> (folder of a random multimodal model in the published layout, the stock model), in fp32."""
    import torch
    import transformers

    made: dict[str, tuple[Path, Any]] = {}

    def make(key: str) -> tuple[Path, Any]:
        if key not in made:
            model_type, vision, _ = MULTIMODAL[key]
            config = transformers.AutoConfig.for_model(
                model_type, text_config=dict(FAMILIES[key].tiny), vision_config=vision, tie_word_embeddings=False
            )
            torch.manual_seed(0)
            stock = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
            folder = tmp_path_factory.mktemp(key)
            stock.save_pretrained(folder, save_original_format=not FAMILIES[key].published_fused, max_shard_size="96KB")
            transformers.AutoTokenizer.from_pretrained(checkpoint(key)).save_pretrained(folder)
            made[key] = folder, stock
        return made[key]

    return make


def logits(model: Any) -> Any:
    """What a model says to a row of text."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([list(IDS)])).logits


@pytest.mark.parametrize("key", MULTIMODAL)
def test_a_multimodal_folder_answers_to_text_as_the_whole_model_does(key: str, multimodal: Any) -> None:
    import torch

    from finetune.base import load_base

    folder, stock = multimodal(key)
    base = load_base(folder, load_in_4bit=False, precision="fp32")
    assert base.family.key == key
    torch.testing.assert_close(logits(base.model), logits(stock), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", MULTIMODAL)
def test_a_multimodal_folder_is_packed_in_its_text_part_and_every_vision_tensor_is_accounted_for(
    key: str, multimodal: Any
) -> None:
    import torch

    from finetune.base import load_base

    folder, _ = multimodal(key)
    family, on_disk = FAMILIES[key], tensors(folder)
    vision = sum(tensor.numel() for name, tensor in on_disk.items() if name.startswith(MULTIMODAL[key][2]))
    assert 0 < vision < sum(tensor.numel() for tensor in on_disk.values())
    parameters = dict(load_base(folder, load_in_4bit=True, precision="bf16").model.named_parameters())
    seen = {name: p for name, p in parameters.items() if "vision" in name or "projector" in name or "visual" in name}
    # Mistral 4 is registered only with its vision part, which is loaded; the others leave theirs on disk.
    assert sum(p.numel() for p in seen.values()) == (vision if family.auto_class != "AutoModelForCausalLM" else 0)
    assert {p.dtype for p in seen.values()} <= {torch.bfloat16}
    packed = {name.split(".layers.", 1)[1] for name, p in parameters.items() if p.dtype == torch.uint8}
    listed = set()
    for layers, *names in ADAPTED[key]:
        listed |= {f"{layer}.{name}" for layer in layers.split() for name in " ".join(names).split()}
    assert {name.removesuffix(".weight") for name in packed} == listed
    assert not any(p.requires_grad for p in parameters.values())


@pytest.mark.parametrize("key", MULTIMODAL)
def test_a_text_only_folder_answers_as_the_text_part_of_the_multimodal_one(
    key: str, multimodal: Any, tmp_path: Path
) -> None:
    import torch
    import transformers

    from finetune.base import load_base

    _, stock = multimodal(key)
    text = getattr(transformers, FAMILIES[key].auto_class).from_config(stock.config.text_config, dtype=torch.float32)
    whole = {name.replace("language_model.", "", 1): tensor for name, tensor in stock.state_dict().items()}
    # Prefixes differ by family: `model.language_model.layers` here, `language_model.model.layers` there.
    text.load_state_dict({name: whole[name] for name in text.state_dict()})
    text.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(checkpoint(key)).save_pretrained(tmp_path)
    assert "text_config" not in json.loads((tmp_path / "config.json").read_text())
    base = load_base(tmp_path, load_in_4bit=False, precision="fp32")
    assert base.family.key == key
    torch.testing.assert_close(logits(base.model), logits(stock), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", MULTIMODAL)
def test_an_adapter_on_a_multimodal_folder_merges_into_its_text_part_only(
    key: str, multimodal: Any, tmp_path: Path
) -> None:
    import torch
    import transformers

    from finetune.adapters import attach
    from finetune.base import load_base
    from finetune.merge import merge_folder

    folder, _ = multimodal(key)
    base = load_base(folder, load_in_4bit=False, precision="fp32")
    model = attach(base, Adapter(targets="all", rank=3, expert_rank=2)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    merge_folder(folder, tmp_path / "adapter", tmp_path / "merged")
    before, after = tensors(folder), tensors(tmp_path / "merged")
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith(MULTIMODAL[key][2]) for name in changed)
    merged = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged.eval()), logits(model), rtol=1e-4, atol=1e-5)
