"""Adapters in every layout we know: read exactly, or refused by name; never misread.

The variants are written here expert by expert with plain loops, from what each program's source says. Those of PEFT
were compared once (2026-11-25, torch 2.13, transformers 5.17) with files that the real PEFT 0.18.1, 0.19.0, 0.19.1 and
0.20.0 wrote for the first four families below, with both stacks and with either: loading and merging gave their logits
to 5e-7. How to repeat that: unzip an old wheel, put it first on PYTHONPATH, wrap a tiny stock model, fill lora_B with
noise, save the adapter and its logits; then load both here.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from finetune.adapters import load_adapter
from finetune.base import load_base
from finetune.families import FAMILIES
from finetune.layouts import AdapterError, adaptable, convert, read_adapter
from finetune.layouts.__main__ import main
from finetune.layouts.plain import Weight
from finetune.merge import merge_folder
from finetune.recipe import Adapter
from tests.tiny_models import adapted, checkpoint, some_ids

RANK = 3
ALL = Adapter(targets="all", rank=4, alpha=8.0, expert_rank=RANK, expert_alpha=5.0)
KINDS = ["mixtral", "qwen3_moe", "llama4", "gpt_oss"]
"""(E, out, in) twice, (E, in, out) without PEFT's mark, (E, in, out) with it."""
UNSLOTH = {"auto_mapping": {"base_model_class": "M", "parent_library": "m", "unsloth_fixed": True}}
OLD, NEW = "unsloth-before-2026-09-17", "peft"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """family -> (folder of our adapter, token ids, logits)."""
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


def one_expert(a, b, experts, rank, expert):
    """(A_e, B_e) of a pair in PEFT's layout, index by index."""
    rows = [expert * rank + k for k in range(rank)]
    columns = [k * experts + expert for k in range(rank)]
    return a[rows], b[:, columns]


def put_together(pairs, *, by_expert=False):
    """lora_A and lora_B of a stack from (A_e, B_e) of each expert."""
    experts, rank = len(pairs), pairs[0][0].shape[0]
    a = torch.stack([pairs[e][0][k] for e in range(experts) for k in range(rank)])
    order = (
        [(e, k) for e in range(experts) for k in range(rank)]
        if by_expert
        else [(e, k) for k in range(rank) for e in range(experts)]
    )
    return a, torch.stack([pairs[e][1][:, k] for e, k in order], dim=1)


def variant(family, source, target, *, swap=False, by_expert=False, alphabetical=False, **settings):
    """A copy of our adapter in another layout; `settings` go into adapter_config.json, None removes one."""
    shutil.copytree(source, target)
    tensors, found = load_file(source / "adapter_model.safetensors"), {}
    inside = f".{FAMILIES[family].experts}."
    for key, a in tensors.items():
        if inside not in key or not key.endswith("lora_A.weight"):
            found.setdefault(key, a)
            continue
        b_key = key.replace("lora_A", "lora_B")
        experts = a.shape[0] // RANK
        assert experts != RANK
        assert tensors[b_key].abs().min() > 0
        pairs = [one_expert(a, tensors[b_key], experts, RANK, e) for e in range(experts)]
        if swap:
            pairs = [(b_e.T, a_e.T) for a_e, b_e in pairs]
        if alphabetical:  # the deeper pair is the other stack's
            deep = "experts.base_layer.lora_"
            key = key.replace(deep, "experts.lora_") if deep in key else key.replace("experts.lora_", deep)
        found[key], found[key.replace("lora_A", "lora_B")] = put_together(pairs, by_expert=by_expert)
    save_file({k: v.contiguous() for k, v in found.items()}, target / "adapter_model.safetensors")
    change(target, **settings)
    return target


def change(folder, **settings):
    values = json.loads((folder / "adapter_config.json").read_text()) | settings
    values = {key: value for key, value in values.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def loaded(family, folder, ids, **how):
    base = load_base(checkpoint(family, not how), **(how or {"load_in_4bit": False, "precision": "fp32"}))
    with torch.no_grad():
        return load_adapter(base, folder)(input_ids=ids).logits


def merged(family, folder, ids, target):
    merge_folder(checkpoint(family, True), folder, target)
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def same(found, logits):
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)


def weights_of(family):
    return adaptable(load_base(checkpoint(family, True), load_in_4bit=False, precision="fp32").model, FAMILIES[family])


MARKED = {"gpt_oss"}
"""Families whose experts say `is_transposed`. PEFT 0.17 and 0.18 did not look."""


def variants(family):
    """Name -> what makes it and what its adapter_config.json says."""
    marked = family in MARKED
    return {
        "PEFT 0.18": {"swap": not marked, "peft_version": "0.18.1"},
        "PEFT 0.17, which wrote no version": {"swap": not marked, "peft_version": None},
        "PEFT 0.19.0, with the mark taken the wrong way round": {"swap": True, "peft_version": "0.19.0"},
        "PEFT, stacks wrapped in alphabetical order": {"alphabetical": True},
        "PEFT 0.18, in alphabetical order": {"swap": not marked, "alphabetical": True, "peft_version": "0.18.0"},
        "Unsloth, order declared by expert": {"by_expert": True, "lora_B_layout": "grouped_by_expert", **UNSLOTH},
        "Unsloth, order declared by rank": {"lora_B_layout": "rank_major", **UNSLOTH},
        "Unsloth on PEFT 0.18, declared": {
            "swap": not marked,
            "by_expert": True,
            "peft_version": "0.18.1",
            "lora_B_layout": "grouped_by_expert",
            **UNSLOTH,
        },
    }


@pytest.mark.parametrize("name", variants(""))
@pytest.mark.parametrize("family", KINDS)
def test_an_adapter_in_a_known_layout_is_loaded_and_merged_as_what_it_is(family, name, original, tmp_path):
    folder, ids, logits = original(family)
    other = variant(family, folder, tmp_path / "adapter", **variants(family)[name])
    same(loaded(family, other, ids), logits)
    same(merged(family, other, ids, tmp_path / "merged"), logits)


def test_the_families_above_are_marked_as_the_tests_think():
    for family in KINDS:
        marks = {weight.is_transposed for weight in weights_of(family).values() if len(weight.shape) == 3}
        assert marks == {family in MARKED}


@pytest.mark.parametrize("family", KINDS)
def test_a_misread_order_of_lora_b_would_be_seen(family, original, tmp_path):
    """The comparisons above can fail: columns by expert, read as PEFT's, move the logits."""
    folder, ids, logits = original(family)
    other = variant(family, folder, tmp_path / "adapter", by_expert=True)
    assert (loaded(family, other, ids) - logits).abs().max() > 1e-2
    assert (merged(family, other, ids, tmp_path / "merged") - logits).abs().max() > 1e-2


def test_a_packed_base_takes_an_old_layout_too(original, tmp_path):
    folder, ids, _ = original("qwen3_moe")
    old = variant("qwen3_moe", folder, tmp_path / "old", swap=True, alphabetical=True, peft_version="0.18.1")
    packed = {"load_in_4bit": True, "precision": "fp32"}
    same(loaded("qwen3_moe", old, ids, **packed), loaded("qwen3_moe", folder, ids, **packed))


def test_what_is_converted_is_said(original, tmp_path, caplog):
    folder, _, _ = original("mixtral")
    old = variant("mixtral", folder, tmp_path / "old", swap=True, peft_version="0.18.1")
    assert len(read_adapter(old, weights_of("mixtral")).converted) == 2
    assert "in and out of gate_up_proj put from the layout before PEFT 0.19.1" in caplog.text
    caplog.clear()
    assert read_adapter(folder, weights_of("mixtral")).converted == []
    assert caplog.text == ""


# --- files that stock PEFT writes here and now ----------------------------------------------------------------------


def stock_model(family):
    folder, eager = checkpoint(family, True), {"experts_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager).eval()


def with_noise(model):
    """The model with lora_B that is not zero, so that mistakes in it show."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
    return model.eval()


def stock(family, target, **settings):
    """(ids, logits) of a stock PEFT adapter, saved to `target`."""
    model = with_noise(get_peft_model(stock_model(family), LoraConfig(**settings)))
    with torch.no_grad():
        ids = torch.randint(5, 60, (2, 19), generator=torch.Generator().manual_seed(3))
        logits = model(input_ids=ids).logits
    model.save_pretrained(target)
    return ids, logits


@pytest.mark.parametrize("stack", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("family", KINDS)
def test_an_adapter_of_one_stack_only_belongs_to_that_stack(family, stack, tmp_path):
    """Its pair lies where the last of two stacks would have it."""
    names = [f"{FAMILIES[family].experts}.{stack}"]
    ids, logits = stock(family, tmp_path / "a", r=RANK, target_modules=["q_proj"], target_parameters=names)
    same(loaded(family, tmp_path / "a", ids), logits)
    same(merged(family, tmp_path / "a", ids, tmp_path / "merged"), logits)


def test_ranks_and_alphas_are_looked_up_apart_as_peft_does(tmp_path):
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "q_proj.weight"]
    settings = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"gate_up_proj": 9, "q_proj": 5, "k_proj": 7}}
    ids, logits = stock(
        "qwen3_moe", tmp_path / "a", r=4, target_modules=["k_proj"], target_parameters=names, **settings
    )
    same(merged("qwen3_moe", tmp_path / "a", ids, tmp_path / "merged"), logits)


def test_stacks_that_peft_wrapped_in_alphabetical_order_are_told_apart(tmp_path):
    """On parametrised experts, as 4-bit ones by bitsandbytes are; here by a parametrisation that changes nothing.

    PEFT 0.21.2 loses the inner update in such a forward pass, so its updates are added to the weights of a bare model.
    """
    bare = stock_model("mixtral")
    model = stock_model("mixtral")
    paths = [name for name, _ in model.named_modules() if name.endswith(".mlp.experts")]
    names = [f"{path}.{name}" for path in paths for name in ("gate_up_proj", "down_proj")]
    for name in names:
        path, _, leaf = name.rpartition(".")
        torch.nn.utils.parametrize.register_parametrization(model.get_submodule(path), leaf, torch.nn.Identity())
    model = with_noise(get_peft_model(model, LoraConfig(r=RANK, target_modules=["q_proj"], target_parameters=names)))
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        for path, module in model.get_base_model().named_modules():
            if hasattr(module, "get_delta_weight"):
                leaf = getattr(module, "parameter_name", "weight")
                weight = bare.get_parameter(f"{path.replace('.base_layer', '')}.{leaf}")
                weight += module.get_delta_weight("default")
        ids = torch.randint(5, 60, (2, 19), generator=torch.Generator().manual_seed(3))
        logits = bare(input_ids=ids).logits
    shapes = {key: value.shape for key, value in load_file(tmp_path / "a" / "adapter_model.safetensors").items()}
    assert shapes[f"base_model.model.{paths[0]}.base_layer.lora_B.weight"] == (64, 4 * RANK)  # of down_proj
    same(loaded("mixtral", tmp_path / "a", ids), logits)
    same(merged("mixtral", tmp_path / "a", ids, tmp_path / "merged"), logits)


# --- what is refused ------------------------------------------------------------------------------------------------


def refusal(folder, family="mixtral", layout=None):
    """The sentence with which a folder is refused by the one check that loading and merging share."""
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder, weights_of(family), layout)
    sentence = caught.value.sentence()
    assert "\n" not in sentence
    assert str(folder) in sentence
    return sentence


def test_loading_and_merging_share_the_check(original, tmp_path):
    folder, ids, _ = original("mixtral")
    other = variant("mixtral", folder, tmp_path / "a", **UNSLOTH)
    for read in (lambda: loaded("mixtral", other, ids), lambda: merged("mixtral", other, ids, tmp_path / "merged")):
        with pytest.raises(AdapterError, match="ADP-013"):
            read()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4", "gpt_oss"])
def test_a_square_stack_without_a_telling_version_is_refused(family, tmp_path):
    """down_proj is square in these bases. PEFT 0.18 and 0.21 mean different updates by the same shapes."""
    names = [f"{FAMILIES[family].experts}.down_proj"]
    folder = tmp_path / "a"
    ids, logits = stock(family, folder, r=RANK, target_modules=["q_proj"], target_parameters=names)
    same(loaded(family, change(folder, peft_version="0.19.1"), ids), logits)
    for version in (None, "0.19.0", "0.18.2.dev0@UNKNOWN", "0.20.1.dev0", "soon"):
        sentence = refusal(change(folder, peft_version=version), family)
        assert "ADP-012" in sentence
        assert f"python -m finetune.layouts {folder} TARGET --from peft-0.18 --base FOLDER_OF_THE_BASE" in sentence
    weights = weights_of(family)
    now = read_adapter(folder, weights, "peft")
    assert now.converted == []
    old = read_adapter(folder, weights, "peft-0.18")
    assert bool(old.converted) == (family not in MARKED)
    assert bool(read_adapter(folder, weights, "peft-0.19.0").converted)
    change(folder, peft_version="0.18.0")
    old_logits = loaded(family, folder, ids)
    assert ((old_logits - logits).abs().max() > 1e-2) == (family not in MARKED)


def test_stacks_of_one_shape_are_told_apart_by_what_names_them(tmp_path):
    """No family has them; the pairs of such stacks fit either way round."""
    weights = {"model.layers.0.moe.up": Weight((5, 8, 6)), "model.layers.0.moe.down": Weight((5, 8, 6))}
    save(tmp_path, weights, ["model.layers.0.moe.up", "model.layers.0.moe.down"])
    with pytest.raises(AdapterError, match=r"ADP-012 .* could be either's"):
        read_adapter(tmp_path, weights)
    change(tmp_path, target_parameters=["moe.up", "moe.down"])
    keys = {update.parameter: update.key for update in read_adapter(tmp_path, weights).updates}
    assert keys["model.layers.0.moe.up"] == "model.layers.0.moe.base_layer"
    assert keys["model.layers.0.moe.down"] == "model.layers.0.moe"


def save(folder, weights, targets):
    """An adapter of two stacks in PEFT's layout, without a model."""
    tensors = {}
    for (_, weight), path in zip(weights.items(), ("moe.base_layer", "moe"), strict=True):
        experts, d1, d2 = weight.shape
        tensors[f"base_model.model.model.layers.0.{path}.lora_A.weight"] = torch.randn(experts * RANK, d2)
        tensors[f"base_model.model.model.layers.0.{path}.lora_B.weight"] = torch.randn(d1, experts * RANK)
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(r=RANK, target_parameters=targets).save_pretrained(folder)


DETAIL = {"parameters": {"gate_up_proj": {"lora_B_layout": "rank_major"}, "down_proj": {"lora_B_layout": "mixed"}}}


@pytest.mark.parametrize(
    "marks",
    [
        UNSLOTH,
        {"lora_B_layout": "mixed"},
        {"unsloth_fused_expert_lora": DETAIL},
        {"auto_mapping": {"unsloth_fused_expert_lora": DETAIL}},
        {"unsloth_fused_expert_lora": {"lora_A_layout": "grouped_by_expert"}},
    ],
)
def test_a_file_of_unsloth_that_does_not_state_its_order_is_refused(marks, original, tmp_path):
    folder, _, _ = original("mixtral")
    other = variant("mixtral", folder, tmp_path / "a", **marks)
    sentence = refusal(other)
    assert "ADP-013" in sentence
    assert (
        f"python -m finetune.layouts {other} TARGET --from {OLD} --base FOLDER_OF_THE_BASE, or --from peft" in sentence
    )


@pytest.mark.parametrize(("said", "layout"), [("rank_major", OLD), ("grouped_by_expert", "peft")])
def test_a_statement_that_contradicts_the_file_is_refused(said, layout, original, tmp_path):
    folder, _, _ = original("mixtral")
    other = variant("mixtral", folder, tmp_path / "a", lora_B_layout=said)
    assert "ADP-013" in refusal(other, layout=layout)


def test_an_unsloth_file_without_expert_stacks_needs_no_statement(tmp_path):
    ids, logits = stock("mixtral", tmp_path / "a", r=4, target_modules=["q_proj", "v_proj"])
    same(loaded("mixtral", change(tmp_path / "a", **UNSLOTH), ids), logits)


def rename(folder, make):
    """A folder whose tensors have other keys and values: `make(key, value) -> pairs of key and value`."""
    path = folder / "adapter_model.safetensors"
    save_file(dict(pair for item in load_file(path).items() for pair in make(*item)), path)


def per_expert(key, value):
    if ".experts." not in key:
        return [(key, value)]
    return [
        (
            key.replace("experts.base_layer", "experts.0.gate_proj").replace(
                "experts.lora", "experts.0.down_proj.lora"
            ),
            value,
        )
    ]


def per_stack(key, value):
    return [
        (
            key.replace("experts.base_layer", "experts.gate_up_proj").replace("experts.lora", "experts.down_proj.lora"),
            value,
        )
    ]


def three_dimensions(key, value):
    return [(key, value.reshape(4, RANK, -1).contiguous() if "experts.lora_A" in key else value)]


def state_dict_keys(key, value):
    return [(key.replace("lora_A.weight", "lora_A.default.weight"), value)]


def half(key, value):
    return [] if "0.self_attn.q_proj.lora_B" in key else [(key, value)]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (per_expert, "ADP-014 .* a pair per expert and matrix, as vLLM, SGLang and transformers 4 have it"),
        (per_stack, "ADP-014 .* a pair under the name of each stack"),
        (three_dimensions, "ADP-014 .* a pair under the name of each stack"),
        (state_dict_keys, "ADP-016 .* is not understood"),
        (half, r"ADP-015 .*self_attn\.q_proj lacks lora_[AB]"),
    ],
)
def test_other_tensors_are_refused_by_the_name_of_their_layout(make, sentence, original, tmp_path):
    folder, _, _ = original("mixtral")
    shutil.copytree(folder, tmp_path / "a")
    rename(tmp_path / "a", make)
    assert_matches(sentence, refusal(tmp_path / "a"))


def assert_matches(pattern, text):
    import re

    assert re.search(pattern, text), text


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"use_dora": True}, "ADP-015 .*lacks lora_magnitude_vector"),
        ({"bias": "all"}, 'ADP-016 .*bias="all"'),
        ({"lora_bias": True}, "ADP-016 .*lora_bias=true"),
        ({"modules_to_save": ["lm_head"]}, r'ADP-016 .*modules_to_save=\["lm_head"\]'),
        ({"trainable_token_indices": [1]}, "ADP-016 .*trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_4"}, "ADP-016 .*init_lora_weights"),
        ({"use_what_comes_next": True}, "ADP-016 .*does not know use_what_comes_next"),
        ({"peft_type": "LOHA"}, "ADP-016 .*its peft_type is LOHA"),
        ({"r": "four"}, "ADP-015 .*a rank is no positive integer"),
        ({"r": True}, "ADP-015 .*a rank is no positive integer"),
        ({"rank_pattern": {"gate_up_proj": 0}}, "ADP-015 .*a rank is no positive integer"),
        ({"lora_alpha": "8"}, "ADP-015 .*an alpha no number"),
        ({"r": 5}, r"ADP-011 .*lora_A \(4, 64\).*with rank 5"),
        ({"rank_pattern": {}}, r"ADP-011 .*lora_A \(12, 64\).*with 4 experts and rank 4 takes \(16, 64\)"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "ADP-011 .*has 2 pairs and target_parameters names 1"),
    ],
)
def test_settings_that_are_wrong_or_mean_more_than_plain_lora_are_refused(settings, sentence, original, tmp_path):
    folder, _, _ = original("mixtral")
    shutil.copytree(folder, tmp_path / "a")
    assert_matches(sentence, refusal(change(tmp_path / "a", **settings)))


def test_an_adapter_for_another_number_of_experts_is_refused(original, tmp_path):
    folder, _, _ = original("mixtral")
    weights = {name: Weight((5, *w.shape[1:])) if len(w.shape) == 3 else w for name, w in weights_of("mixtral").items()}
    with pytest.raises(AdapterError, match=r"ADP-011 .*lora_A \(12, 64\).* with 5 experts and rank 3 takes \(15, 64\)"):
        read_adapter(folder, weights)


def break_config(folder):
    (folder / "adapter_config.json").write_text("{peft")


def list_config(folder):
    (folder / "adapter_config.json").write_text("[]")


def no_config(folder):
    (folder / "adapter_config.json").unlink()


def no_tensors(folder):
    (folder / "adapter_model.safetensors").unlink()


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def truncated(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def short(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"\x00")


def second_adapter(folder):
    (folder / "other").mkdir()
    shutil.copy(folder / "adapter_config.json", folder / "other")


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (break_config, r"ADP-015 .*adapter_config\.json cannot be read"),
        (list_config, "ADP-016 .*its peft_type is list"),
        (no_config, "ADP-015 .*it is missing"),
        (no_tensors, r"ADP-015 .*adapter_model\.safetensors is missing"),
        (pickled, r"FRN-001 .*adapter_model\.bin: pickles can run code .* are never read"),
        (truncated, "ADP-015 .*is damaged"),
        (short, "ADP-015 .*is damaged"),
        (second_adapter, "ADP-015 .*holds several adapters; subfolders hold other"),
    ],
)
def test_missing_and_damaged_files_are_a_sentence(harm, sentence, original, tmp_path):
    folder, _, _ = original("mixtral")
    shutil.copytree(folder, tmp_path / "a")
    harm(tmp_path / "a")
    assert_matches(sentence, refusal(tmp_path / "a"))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_an_adapter_of_another_base_is_refused_when_loading(family, original):
    folder, ids, _ = original("mixtral")
    with pytest.raises(AdapterError, match="ADP-011"):
        loaded(family, folder, ids)


# --- the converter --------------------------------------------------------------------------------------------------


def test_the_command_writes_what_stock_peft_reads(original, tmp_path, capsys):
    """An old file of Unsloth on PEFT 0.18: both differences at once, and the marks of both."""
    folder, ids, logits = original("qwen3_moe")
    old = variant("qwen3_moe", folder, tmp_path / "old", swap=True, by_expert=True, peft_version="0.18.1", **UNSLOTH)
    target = tmp_path / "new"
    assert main([str(old), str(target), "--from", OLD, "--base", str(checkpoint("qwen3_moe", True))]) == 0
    assert "columns of lora_B of gate_up_proj put from Unsloth's former order" in capsys.readouterr().out
    stock_one = PeftModel.from_pretrained(stock_model("qwen3_moe"), target).eval()
    with torch.no_grad():
        same(stock_one(input_ids=ids).logits, logits)
    same(loaded("qwen3_moe", target, ids), logits)
    values = json.loads((target / "adapter_config.json").read_text())
    assert values["auto_mapping"]["unsloth_fixed"]
    assert values["auto_mapping"]["lora_B_layout"] == "rank_major"  # so that Unsloth does not convert it again
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (target, folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_a_file_of_unsloth_after_the_fix_needs_only_the_word(original, tmp_path):
    folder, ids, logits = original("mixtral")
    new = variant("mixtral", folder, tmp_path / "new", **UNSLOTH)
    base = checkpoint("mixtral", True)
    change(new, base_model_name_or_path=str(base))
    assert main([str(new), str(tmp_path / "stated"), "--from", NEW]) == 0
    same(loaded("mixtral", tmp_path / "stated", ids), logits)
    assert convert(tmp_path / "stated", tmp_path / "again", NEW, base).converted == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{here}/none", "{here}/b", "--from", "peft", "--base", "{base}"], r"ADP-015 .*none/adapter_config\.json"),
        (["{here}/a", "{here}/b", "--from", "peft", "--base", "{here}/no"], "ADP-015 the base .*no is not a folder"),
        (["{here}/a", "{here}/b", "--from", "peft"], "ADP-015 the base .* is not a folder here"),
        (["{here}/a", "{here}/a", "--from", "peft", "--base", "{base}"], "ADP-015 .* exists already"),
    ],
)
def test_the_command_ends_with_one_sentence(words, sentence, original, tmp_path, capsys):
    folder, _, _ = original("mixtral")
    shutil.copytree(folder, tmp_path / "a")
    change(tmp_path / "a", base_model_name_or_path="somebody/something")
    places = {"here": tmp_path, "base": checkpoint("mixtral", True)}
    assert main([word.format(**places) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert_matches(sentence, said)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_command_that_errors_name_exists():
    done = subprocess.run([sys.executable, "-m", "finetune.layouts", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert OLD in done.stdout
