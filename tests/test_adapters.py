"""Where LoRA goes in every family, and that what it computes is what stock PEFT computes from the same files."""

import pytest
import torch
import transformers
from peft import PeftModel

from finetune.adapters import attach, check_coverage, coverage, load_adapter
from finetune.base import load_base
from finetune.errors import NumbersError
from finetune.families import FAMILIES
from finetune.recipe import Adapter
from tests.tiny_models import adapted, checkpoint, some_ids

ALL = Adapter(targets="all", rank=4, alpha=8.0, expert_rank=3, expert_alpha=5.0, router=False)


def test_there_are_thirteen_families_or_more():
    assert len(FAMILIES) >= 13


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_gives_our_logits_and_gradients_from_our_files(family, tmp_path):
    base, model = adapted(family, ALL)
    ids = some_ids(base)
    ours = model(input_ids=ids, labels=ids)
    ours.loss.backward()
    model.save_pretrained(tmp_path)
    experts = {"experts_implementation": "eager"} if FAMILIES[family].experts else {}
    auto = getattr(transformers, FAMILIES[family].auto_class)
    bare = auto.from_pretrained(checkpoint(family, True), dtype=torch.float32, **experts)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, bare(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    stock = PeftModel.from_pretrained(bare, tmp_path, is_trainable=True).eval()
    theirs = stock(input_ids=ids, labels=ids)
    theirs.loss.backward()
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    expected = {name: p.grad for name, p in stock.named_parameters() if p.requires_grad}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-9, name


@pytest.mark.parametrize("family", ["mixtral", "llama4", "gpt_oss"])
def test_we_load_what_stock_peft_trained(family, tmp_path):
    """The way back, for each of the three ways in which stacks are laid out."""
    from peft import LoraConfig, get_peft_model

    folder = checkpoint(family, True)
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    names = [f"{FAMILIES[family].experts}.{name}" for name in FAMILIES[family].expert_parameters]
    stock = get_peft_model(stock, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=names))
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
    stock.save_pretrained(tmp_path)
    base = load_base(folder, load_in_4bit=False, precision="fp32")
    ids = some_ids(base)
    with torch.no_grad():
        expected = stock.eval()(input_ids=ids).logits
        found = load_adapter(base, tmp_path).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["attention", "experts", "all"])
def test_the_coverage_table_says_what_is_packed_and_what_is_adapted(family, targets):
    base = load_base(checkpoint(family), load_in_4bit=True, precision="bf16")
    model = attach(base, Adapter(targets=targets, rank=2, expert_rank=2))
    rows = {row.group: row for row in coverage(model, base.family)}
    asked = {
        "attention": {"attention"},
        "experts": {"attention", "routed"},
        "all": {"attention", "routed", "shared", "dense"},
    }
    for group, row in rows.items():
        if group in asked[targets]:
            assert row.adapted > 0.5 * row.parameters, group
            assert row.trainable > 0, group
        else:
            assert row.adapted == row.trainable == 0, group
        if group in ("routed", "shared", "dense"):
            assert row.parameters_4bit > 0.97 * row.parameters, group  # biases of some families stay as they are
            assert row.bytes < 0.65 * row.parameters, group
        if group in ("router", "embedding", "other"):
            assert row.parameters_4bit == 0, group
    assert sum(row.parameters for row in rows.values()) == sum(
        p.numel() for p in load_base(checkpoint(family), load_in_4bit=False, precision="bf16").model.parameters()
    )


@pytest.mark.parametrize("family", [key for key, family in FAMILIES.items() if family.experts])
def test_the_router_is_adapted_only_when_asked_and_then_learns(family):
    base = load_base(checkpoint(family), load_in_4bit=True, precision="fp32")
    model = attach(base, Adapter(rank=2, expert_rank=2, router=True)).train()
    rows = {row.group: row for row in coverage(model, base.family)}
    # a correction bias, or a router without a score of its own, is no weight that LoRA can adapt
    assert rows["router"].adapted >= 0.9 * rows["router"].parameters
    ids = some_ids(base)
    model(input_ids=ids, labels=ids).loss.backward()
    routers = {
        name: p for name, p in model.named_parameters() if f".{base.family.router}." in name and "lora_B" in name
    }
    assert routers
    assert any(p.grad is not None and bool(p.grad.any()) for p in routers.values())


def test_an_adapter_that_misses_a_layer_is_refused():
    base = load_base(checkpoint("mixtral"), load_in_4bit=True, precision="bf16")
    model = attach(base, Adapter(targets="attention", rank=2))
    with pytest.raises(NumbersError, match=r"ADP-010 adapter\.targets=experts asks for"):
        check_coverage(model, base.family, Adapter(targets="experts"))


def test_training_evaluating_and_training_again_keeps_every_gradient():
    """bitsandbytes repacks weights in evaluation on CPUs with AVX512-BF16 and later loses input gradients."""
    base, model = adapted("mixtral", ALL, fp32=False, load_in_4bit=True, precision="bf16")
    ids = some_ids(base)

    def gradients():
        model.zero_grad()
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    after = gradients()
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name
    assert all(bool(g.any()) for g in before.values())


def test_a_cpu_that_would_repack_weights_in_evaluation_is_told_not_to(monkeypatch):
    """The test before shows the damage only on such a CPU; this one shows on every CPU that it cannot happen."""
    import bitsandbytes as bnb

    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    base = load_base(checkpoint("mixtral"), load_in_4bit=True, precision="bf16")
    maps = [module for module in base.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(maps) >= 8
    assert not any(module.support_avx512bf16_for_cpu for module in maps)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    base, model = adapted("mixtral", ALL, fp32=False, load_in_4bit=True)
    ids = some_ids(base)

    def gradients():
        model.zero_grad()
        model.train()
        for part in (ids, ids.flip(1)):  # accumulated
            model(input_ids=part, labels=part).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for a, b in zip(plain, gradients(), strict=True):
        assert torch.equal(a, b)


def test_adapter_weights_are_fp32_beside_a_bf16_base():
    _, model = adapted("mixtral", ALL, fp32=False, load_in_4bit=True, precision="bf16")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
