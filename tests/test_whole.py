"""Full fine-tuning: the base's own weights get the right gradients, and come whole into the original layout."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from finetune import sizes
from finetune.base import load_base
from finetune.check import problems
from finetune.errors import AdapterError, NumbersError, WeightsError
from finetune.families import FAMILIES
from finetune.merge import merge_folder
from finetune.plan import plan
from finetune.recipe import Adapter
from finetune.train.learnt import unlearnt
from finetune.whole import begin, exact_precision, fingerprints, load_trained, save
from tests.job import good
from tests.tiny_models import checkpoint, some_ids, tensors

EVERYTHING = Adapter(method="full", load_in_4bit=False, targets="all", router=True, embeddings=True)
LAYOUTS = ["llama4", "deepseek_v32", "deepseek_v4", "qwen3_moe", "qwen3_5_moe", "gpt_oss"]
"""Stacks both ways round and fused or not on disk, biases, names of their own on disk, weights that only choose."""


def whole(**settings: Any) -> Adapter:
    """An adapter setting of full fine-tuning."""
    return Adapter(method="full", load_in_4bit=False, **settings)


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model in a folder as transformers loads it, its experts one by one in a plain loop."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    family = next(family for family in FAMILIES.values() if kind in family.model_types)
    experts = {"experts_implementation": "eager"} if family.experts else {}
    return getattr(transformers, family.auto_class).from_pretrained(folder, dtype=dtype, **experts)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The model's logits in evaluation mode."""
    return model.eval()(input_ids=ids).logits


def moved(model: Any) -> dict[str, torch.Tensor]:
    """Moves every trained weight a little; all of them by name."""
    torch.manual_seed(2)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return {name: parameter.detach() for name, parameter in trained.items()}


@pytest.mark.parametrize("family", LAYOUTS)
def test_gradients_of_all_weights_are_those_of_a_plain_loop_in_float64(family):
    kind, folder = FAMILIES[family], checkpoint(family, True)
    base = load_base(folder, load_in_4bit=False, precision="fp32")
    ids = some_ids(base)
    ours, theirs = begin(base, EVERYTHING, "fp32").train(), stock(folder, torch.float64).train()
    for model in (ours, theirs):
        model(input_ids=ids, labels=ids).loss.backward()
    right = dict(theirs.named_parameters())
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == sizes.trained_parameters(
        kind.matrices(kind.tiny), kind, EVERYTHING
    )
    for name, parameter in trained.items():
        expected = right.pop(name).grad
        assert (parameter.grad - expected).norm() < 1e-4 * expected.norm(), name
    assert all(p.grad is None for p in right.values())  # what is left out has no gradient
    assert bool(right) == bool(kind.unreachable)


@pytest.mark.parametrize("family", LAYOUTS)
def test_what_was_trained_stands_in_the_original_layout_and_all_else_byte_for_byte(family, tmp_path):
    base = load_base(checkpoint(family, True), load_in_4bit=False, precision="fp32")
    ids = some_ids(base)
    model = begin(base, whole(targets="all"), "fp32")
    before = logits(model, ids)
    save(tmp_path / "tuned", moved(model), {})
    expected = logits(model, ids)
    merge_folder(base.folder, tmp_path / "tuned", tmp_path / "merged")
    merged = stock(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-4, atol=1e-5)
    assert (expected - before).abs().max() > 1e-2
    old, new = tensors(base.folder), tensors(tmp_path / "merged")
    assert list(old) == list(new)
    same = {key for key in old if torch.equal(old[key], new[key])}
    frozen = {key for key in old if re.search(r"embed|head\.weight|indexer|router|\.gate\.", key)}
    assert same == frozen
    assert len(same) < len(old) / 3


def test_a_base_in_bf16_is_trained_in_fp32_and_rounded_once(tmp_path):
    folder = checkpoint("mixtral")
    assert exact_precision(folder, "bf16") == "bf16"
    assert exact_precision(checkpoint("mixtral", True), "bf16") == "fp32"
    base = load_base(folder, load_in_4bit=False, precision="bf16")
    model = begin(base, whole(targets="experts"), "bf16")
    kinds = {name.split(".")[-2]: p.dtype for name, p in model.named_parameters()}
    assert kinds["q_proj"] == kinds["experts"] == kinds["embed_tokens"] == torch.float32
    attention = begin(load_base(folder, load_in_4bit=False, precision="bf16"), whole(targets="attention"), "bf16")
    assert {p.dtype for n, p in attention.named_parameters() if "experts" in n} == {torch.bfloat16}
    save(tmp_path / "tuned", moved(model), {})
    merge_folder(folder, tmp_path / "tuned", tmp_path / "merged")
    new = tensors(tmp_path / "merged")
    assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}
    key = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(new[key], dict(model.named_parameters())[key].to(torch.bfloat16))


def test_base_and_tuned_are_the_same_model_with_other_weights(tmp_path):
    folder = checkpoint("mixtral", True)
    base = load_base(folder, load_in_4bit=False, precision="fp32")
    ids = some_ids(base)
    model = begin(base, whole(targets="experts"), "fp32")
    save(tmp_path, moved(model), {})
    tuned, untouched = logits(model, ids), logits(stock(folder), ids)
    again = load_trained(load_base(folder, load_in_4bit=False, precision="fp32"), tmp_path)
    assert torch.equal(logits(again, ids), tuned)
    for _ in range(2):
        with again.disable_adapter():
            torch.testing.assert_close(logits(again, ids), untouched, rtol=1e-5, atol=1e-6)
        assert torch.equal(logits(again, ids), tuned)
    assert not torch.allclose(tuned, untouched, atol=1e-3)


def test_a_tuned_folder_that_is_cut_or_of_another_base_is_refused(tmp_path):
    base = load_base(checkpoint("mixtral", True), load_in_4bit=False, precision="fp32")
    save(tmp_path / "tuned", moved(begin(base, whole(targets="attention"), "fp32")), {})
    with pytest.raises(AdapterError, match=r"ADP-019 .*k_proj.weight is \(32, 64\), in the base not there"):
        load_trained(
            load_base(checkpoint("deepseek_v3", True), load_in_4bit=False, precision="fp32"), tmp_path / "tuned"
        )
    with pytest.raises(WeightsError, match="MRG-001 the base has no weight"):
        merge_folder(checkpoint("deepseek_v3", True), tmp_path / "tuned", tmp_path / "merged")
    listed = json.loads((tmp_path / "tuned" / "tuned.json").read_text())
    listed["tensors"].append("model.more")
    (tmp_path / "tuned" / "tuned.json").write_text(json.dumps(listed))
    with pytest.raises(AdapterError, match=r"ADP-018 .*1 weights are on one side only, e.g. model.more"):
        load_trained(base, tmp_path / "tuned")
    file = tmp_path / "tuned" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="ADP-018"):
        load_trained(base, tmp_path / "tuned")


def test_a_weight_that_did_not_move_is_refused_unless_its_expert_met_no_token():
    base = load_base(checkpoint("mixtral", True), load_in_4bit=False, precision="fp32")
    model = begin(base, whole(targets="experts"), "fp32")
    begun = fingerprints(model)
    trained = moved(model)
    assert unlearnt(model, {}, begun)[0] == {}
    stack = "model.layers.0.mlp.experts.down_proj"
    old = load_base(checkpoint("mixtral", True), load_in_4bit=False, precision="fp32").model.get_parameter(stack)
    with torch.no_grad():
        trained[stack][2] = old[2]
    assert unlearnt(model, {}, begun)[0] == {stack: [2]}
    ids = some_ids(base)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(NumbersError, match=r"TRN-004 down_proj of model.layers.0.mlp.experts: experts \[2\] got"):
        unlearnt(model, {}, begun)
    with torch.no_grad():
        trained[stack][2, 0, 0] += 1e-6
        trained["model.layers.1.self_attn.o_proj.weight"].copy_(
            stock(base.folder).get_parameter("model.layers.1.self_attn.o_proj.weight")
        )
    with pytest.raises(NumbersError, match=r"TRN-002 model.layers.1.self_attn.o_proj.weight did not change"):
        unlearnt(model, {}, begun)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_the_plan_counts_what_is_trained(family, targets):
    kind, adapter = FAMILIES[family], whole(targets=targets)
    recipe = good(model__family=family, model__config=dict(kind.tiny), adapter=adapter, export__formats=["hf"])
    recipe.data.max_length = 64
    assert problems(recipe) == []
    with torch.device("meta"):
        text = transformers.AutoConfig.for_model(**kind.tiny)
        model = getattr(transformers, kind.auto_class).from_config(text)
    counted = sum(p.numel() for name, p in model.named_parameters() if sizes.is_trained(name, kind, adapter))
    figures = plan(recipe)
    assert figures.figure("trainable").value == counted > 0
    assert figures.figure("tuned").value * 2**30 == pytest.approx(4 * counted)
    parts = [figures.figure(name).value * 2**30 for name in ("trained weights", "gradients", "optimizer")]
    assert parts == pytest.approx([4 * counted, 4 * counted, 8 * counted])
    frozen = sum(p.numel() for p in model.parameters()) - counted
    kept = figures.figure("frozen weights").value * 2**30
    assert 2 * frozen <= kept <= 4 * frozen
