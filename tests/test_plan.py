"""The plan against figures that were counted or published elsewhere, and against stock PEFT."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune import machine, memory, sizes
from finetune.compose import load_recipe, recipe_names
from finetune.families import FAMILIES
from finetune.plan import Plan, cache_gib, plan, run_folder_gib
from tests.job import good

ROOT = Path(__file__).resolve().parent.parent


def value(figures: Plan, name: str) -> float:
    return figures.figure(name).value


@pytest.mark.parametrize(
    ("recipe", "total", "active"),
    [  # billions, as their publishers state them
        ("llama4_70b_legal", 109, 17),
        ("deepseek_v3_finance", 671, 37),
        ("deepseek_v4_legal", 284, 13),
        ("mistral_large3_government", 673, 39),
        ("qwen3_235b_medical", 235, 22),
        ("qwen3_30b_legal", 30.5, 3.3),
        ("gpt_oss_120b_support", 117, 5.1),
        ("olmoe_7b_legal", 6.9, 1.3),
    ],
)
def test_parameters_are_those_the_publishers_state(recipe: str, total: float, active: float) -> None:
    figures = plan(load_recipe(recipe))
    assert value(figures, "parameters") / 1e9 == pytest.approx(total, rel=0.02)
    ours, embedding = value(figures, "active per token") / 1e9, sizes.matrices(load_recipe(recipe).model)[0]
    assert (
        0.97 * ours < active < 1.03 * (ours + embedding.parameters / 1e9)
    )  # some count the input embedding, some do not


def test_the_quickstarts_base_has_the_parameters_that_were_counted_in_its_files() -> None:
    assert value(plan(load_recipe("legal_quickstart")), "parameters") == 373_462_848


@pytest.mark.parametrize(
    ("recipe", "gib"),
    [("qwen3_30b_legal", 17e9 / 2**30), ("llama4_70b_legal", 61e9 / 2**30), ("deepseek_v3_finance", 377e9 / 2**30)],
)
def test_packed_weights_are_as_large_as_nf4_makes_them(recipe: str, gib: float) -> None:
    figures = plan(load_recipe(recipe))
    names = ("expert stacks, 4-bit", "other linear maps, 4-bit", "scales (absmax)")
    packed = sum(value(figures, name) for name in names)
    assert packed == pytest.approx(gib, rel=0.07)


def test_memory_by_hand_for_a_tiny_model() -> None:
    recipe = good(train__precision="fp32", train__batch_size=2, data__max_length=100)
    c = FAMILIES["mixtral"].tiny
    hidden, vocabulary, layers, experts, inner = (
        c[k] for k in ("hidden_size", "vocab_size", "num_hidden_layers", "num_local_experts", "intermediate_size")
    )
    head = hidden // c["num_attention_heads"]
    keys = c["num_key_value_heads"] * head
    stacks = layers * experts * 3 * hidden * inner
    attention = layers * 2 * (hidden * hidden + hidden * keys)
    rest = 2 * vocabulary * hidden + layers * (experts * hidden + 2 * hidden) + hidden
    lora = layers * (16 * (2 * 2 * hidden + 2 * (hidden + keys)) + 8 * experts * (hidden + 2 * inner + inner + hidden))
    parts = {p.name: p.value * 2**30 for p in memory.memory(recipe)}
    assert parts["expert stacks, 4-bit"] == pytest.approx(stacks * 0.5)
    assert parts["other linear maps, 4-bit"] == pytest.approx(attention * 0.5)
    assert parts["scales (absmax)"] == pytest.approx((stacks + attention) * 4 / 64)
    assert parts["weights kept in fp32"] == pytest.approx(rest * 4)
    assert parts["adapter weights"] == parts["gradients"] == pytest.approx(lora * 4)
    assert parts["optimizer"] == pytest.approx(lora * 8)
    assert parts["logits"] == pytest.approx(200 * vocabulary * 10)


@pytest.mark.parametrize("targets", ["attention", "experts"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_trainable_parameters_are_those_of_stock_peft(family: str, targets: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    f = FAMILIES[family]
    tiny = dict(f.tiny)
    recipe = good(model__family=family, model__config=tiny, adapter__targets=targets, adapter__rank=5)
    recipe.adapter.expert_rank = 3
    config = AutoConfig.for_model(tiny.pop("model_type"), **tiny)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stacks = [f"{f.experts}.{name}" for name in f.expert_parameters] if targets == "experts" else []
    lora = LoraConfig(
        r=5,
        target_modules=[name.rpartition(".")[2] for name in f.attention],
        target_parameters=stacks or None,
        rank_pattern={name.replace(".", r"\."): 3 for name in stacks},
    )
    counted = get_peft_model(model, lora, low_cpu_mem_usage=True).get_nb_trainable_parameters()[0]
    assert sizes.lora_parameters(sizes.matrices(recipe.model), f, recipe.adapter) == counted


def test_every_parameter_is_counted_as_transformers_counts_it() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for family in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe"):
        tiny = dict(FAMILIES[family].tiny)
        weights = sizes.matrices(good(model__family=family, model__config=tiny).model)
        config = AutoConfig.for_model(tiny["model_type"], **{k: v for k, v in tiny.items() if k != "model_type"})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert sizes.total_parameters(weights) == sum(p.numel() for p in model.parameters()), family


@pytest.mark.parametrize(
    ("recipe", "usd"),
    [("qwen3_30b_legal", 3), ("gpt_oss_120b_support", 5), ("llama4_70b_legal", 15), ("deepseek_v3_finance", 33)],
)
def test_a_hundred_million_tokens_cost_what_was_worked_out_by_hand(recipe: str, usd: float) -> None:
    # 4 x active parameters x 1e8 tokens on an H100 at 25 % of its peak and 2 USD an hour
    settings = [
        "train.gradient_checkpointing=false",
        "train.batch_size=10",
        "train.accumulation=10",
        "data.max_length=1000",
    ]
    costs = ["costs.device_tflops=989", "costs.utilisation=0.25", "costs.price_per_hour=2", "adapter.rank=1"]
    steps = ["train.max_steps=1000", "adapter.expert_rank=1", "adapter.targets=attention"]
    figures = plan(load_recipe(recipe, *settings, *costs, *steps))
    assert value(figures, "tokens") == 1e8
    assert value(figures, "price") == pytest.approx(usd, rel=0.15)


def test_steps_tokens_and_flops_follow_from_rows() -> None:
    recipe = good(data__train_rows=100, data__max_length=50, train__epochs=2.0, train__accumulation=2)
    figures = plan(recipe)
    active = value(figures, "active per token")
    assert value(figures, "rows per update") == 8
    assert value(figures, "steps") == 25  # 200 rows / 8
    assert value(figures, "tokens") == 200 * 50
    assert value(figures, "forward") == 2 * active * 10_000
    assert value(figures, "recompute") == 0
    recipe.train.gradient_checkpointing = True
    assert value(plan(recipe), "recompute") == 2 * active * 10_000
    recipe.train.max_steps = 3
    assert value(plan(recipe), "tokens") == 3 * 8 * 50


def test_adapted_experts_cost_only_the_experts_a_token_uses() -> None:
    recipe = good()
    weights, family = sizes.matrices(recipe.model), FAMILIES["mixtral"]
    attention = dataclasses.replace(recipe.adapter, targets="attention")
    total = sizes.lora_parameters(weights, family, recipe.adapter) - sizes.lora_parameters(weights, family, attention)
    active = sizes.active_lora_parameters(weights, family, recipe.adapter) - sizes.lora_parameters(
        weights, family, attention
    )
    assert total == 2 * active  # 4 experts, 2 per token


def test_rows_are_counted_where_they_can_be(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n" * 50 + "\n")
    own = good(data__card="", data__train_files=[str(rows)], data__heldout_fraction=0.1)
    assert plan(own).figure("training rows").value == 45
    assert plan(own).figure("training rows").basis == "given"
    card = plan(good()).figure("training rows")
    assert (card.value, card.basis) == (960, "given")
    assert plan(good(data__train_rows=30)).figure("training rows").value == 30
    (tmp_path / "report.json").write_text(json.dumps({"splits": {"train": {"rows": 7, "tokens": 70}}}))
    prepared = plan(own, prepared=tmp_path)
    assert prepared.figure("training rows").value == 7
    assert prepared.figure("tokens per row").value == 10
    assert prepared.figure("tokens").basis == "computed" and plan(own).figure("tokens").basis == "assumed"


def test_prepared_rows_say_how_long_the_longest_is_and_so_what_activations_take(tmp_path: Path) -> None:
    recipe = good(data__max_length=400)
    splits = {"train": {"rows": 7, "tokens": 70, "longest": 100}, "heldout": {"rows": 2}}
    (tmp_path / "report.json").write_text(json.dumps({"splits": splits}))
    before, after = plan(recipe), plan(recipe, prepared=tmp_path)
    for name in ("activations", "logits"):
        assert value(after, name) == pytest.approx(value(before, name) / 4)
    assert value(after, "optimizer") == value(before, "optimizer")
    packed = {"splits": splits, "packing": {"sequences": 3}}  # a packed sequence may be as long as is allowed
    (tmp_path / "report.json").write_text(json.dumps(packed))
    assert value(plan(recipe, prepared=tmp_path), "logits") == value(before, "logits")


def test_what_fits_fits_and_the_smallest_change_makes_the_rest_fit() -> None:
    recipe = load_recipe("qwen3_30b_legal", "train.gradient_checkpointing=false", "train.batch_size=8")
    need = memory.needed_gib(recipe)
    recipe.costs.device_gib = need + 0.01
    assert plan(recipe).fits and plan(recipe).change == ()
    seen = set()
    for limit in (need - 1, need / 2, need / 3, 30.0, 24.0):
        recipe.costs.device_gib = limit
        change = memory.smallest_change(recipe)
        if change:
            changed = load_recipe(
                "qwen3_30b_legal", "train.gradient_checkpointing=false", "train.batch_size=8", *change
            )
            assert memory.needed_gib(changed) <= limit
            per_update = changed.train.batch_size * changed.train.accumulation
            assert per_update == recipe.train.batch_size * recipe.train.accumulation
            seen.add(len(change))
    assert len(seen) >= 2


def test_a_model_larger_than_any_setting_says_so() -> None:
    figures = plan(load_recipe("deepseek_v3_finance"))
    assert not figures.fits and figures.change == ()
    words = "launch.distribution=fsdp2", "launch.nodes=2", "launch.devices=8"
    assert f"it fits with launch=slurm {' '.join(words)}. scale=rehearsal" in figures.verdict
    spread = load_recipe("deepseek_v3_finance", *words, "launch.kind=slurm")
    assert memory.needed_gib(spread) <= spread.costs.device_gib < memory.needed_gib(load_recipe("deepseek_v3_finance"))
    assert memory.shards(spread) == 16


def test_devices_that_share_a_base_hold_their_part_of_it() -> None:
    one, four = load_recipe("qwen3_30b_legal"), load_recipe("qwen3_30b_legal", "launch=fsdp2", "launch.devices=4")
    parts = [{part.name: part.value for part in memory.memory(recipe)} for recipe in (one, four)]
    assert parts[1]["expert stacks, 4-bit"] == parts[0]["expert stacks, 4-bit"] / 4
    assert parts[1]["other linear maps, 4-bit"] == parts[0]["other linear maps, 4-bit"] / 4
    assert parts[1]["scales (absmax)"] == parts[0]["scales (absmax)"] / 4
    assert parts[1]["unpacked weights"] > parts[0]["unpacked weights"]
    assert parts[1]["activations"] == parts[0]["activations"]


def test_every_recipe_plans_at_full_scale_and_as_a_rehearsal() -> None:
    names, tiny_families = recipe_names(), set()
    assert len(names) == 42
    for name in names:
        recipe = load_recipe(name)
        figures = plan(recipe)
        assert figures.note and figures.duties and "not stated" not in figures.facts, name
        assert run_folder_gib(figures) > 0.5
        json.dumps(figures.as_json(), allow_nan=False)
        if recipe.model.family in tiny_families:  # the tiny model is that of the family
            continue
        tiny_families.add(recipe.model.family)
        tiny = plan(load_recipe(name, "scale=rehearsal"))
        assert tiny.fits and value(tiny, "parameters") < 5e6 and run_folder_gib(tiny) < 0.1, name
        assert cache_gib(tiny) < 0.1
    assert len(tiny_families) == 11


def test_the_recipe_that_asks_for_a_70b_says_that_there_is_none() -> None:
    text = (ROOT / "recipes" / "recipe" / "llama4_70b_legal.yaml").read_text()
    assert "No public 70B Llama 4 exists" in text
    assert "70B" in plan(load_recipe("llama4_70b_legal")).note


def test_every_figure_says_where_it_comes_from() -> None:
    figures = plan(load_recipe("qwen3_30b_legal"))
    every = list(itertools.chain(*figures.groups().values()))
    assert len(every) > 45 and len({f.name for f in every}) == len(every)
    assert all(f.how and f.basis in ("given", "assumed", "computed") for f in every)
    assert value(figures, "memory") == pytest.approx(sum(f.value for f in figures.memory[:-1]))


def run_plan(*words: str) -> dict[str, Any]:
    """What a fresh process prints for `plan --json`; it fails if torch was imported."""
    code = (
        "import sys; from finetune.__main__ import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'trl', 'bitsandbytes'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def test_no_recipe_imports_torch_or_opens_a_socket_to_plan() -> None:
    code = """
import contextlib, io, socket, sys
from finetune.__main__ import main
from finetune.compose import recipe_names

opened = []
sys.addaudithook(lambda event, args: opened.append(event) if event.startswith("socket.") else None)
names, printed = recipe_names(), 0
for verb in (*(["plan", f"recipe={name}"] for name in names), ["plan", "tco", f"recipe={names[0]}"]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([*verb, "--json"]) == 0
    printed += len(out.getvalue()) > 1000
heavy = sorted({"torch", "transformers", "peft", "datasets", "trl", "bitsandbytes"} & set(sys.modules))
count = len(opened)
socket.socket().close()  # the hook sees one when there is one
print(len(names), printed, count, len(opened) > count, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    recipes = len(recipe_names())
    assert recipes == 42
    assert done.stdout.strip() == f"{recipes} {recipes + 1} 0 True []"


def test_plan_prints_json_without_torch_and_without_weights() -> None:
    printed = run_plan("plan", "recipe=llama4_70b_legal", "--json")
    assert printed["model"] == "Llama-4-Scout-17B-16E-Instruct"
    assert any("Built with Llama" in duty for duty in printed["duties"])


def test_plan_prints_a_page_with_note_duties_verdict_and_what_is_missing() -> None:
    words = [sys.executable, "-m", "finetune", "plan", "recipe=llama4_70b_legal"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
    for part in ("No 70B Llama 4", "Built with", "Fits: ", "active per token", "assumed", "WGT-003", "scale=rehearsal"):
        assert part in done.stdout


def test_only_as_many_layers_recompute_as_memory_demands() -> None:
    recipe = load_recipe("qwen3_30b_legal")
    layers = 48
    whole = load_recipe("qwen3_30b_legal", "train.gradient_checkpointing=false")
    kept = {part.name: part.value for part in memory.memory(whole)}
    fixed = sum(kept[name] for name in ("logits", "unpacked weights", "reserve", "gradients", "optimizer"))
    frees = [0.0, *(fixed + kept["activations"] * share for share in (0.25, 0.5, 0.75)), 1000.0]
    counts = [memory.layers_to_recompute(recipe, layers, free) for free in frees]
    assert counts[0] == layers
    assert counts[-1] == 0
    assert layers > counts[1] > counts[2] > counts[3] > 0
    assert memory.layers_to_recompute(recipe, layers, fixed + kept["activations"] + 0.01) == 0
    assert memory.layers_to_recompute(recipe, layers, fixed + kept["activations"] - 0.01) > 0


def test_auto_precision_is_settled_by_what_the_machine_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("legal_quickstart")
    assert recipe.train.precision == "auto"
    for able, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(machine, "multiplies_bf16", lambda able=able: able)
        assert machine.settled(recipe).train.precision == precision
    stated = load_recipe("legal_quickstart", "train.precision=bf16")
    assert machine.settled(stated) is stated
