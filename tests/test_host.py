"""What the host needs while loading, preparing and merging, and work and cost that the plan's groups hold beside."""

from __future__ import annotations

import pytest

from finetune import check, disk, memory, sizes, work
from finetune.compose import load_recipe
from finetune.cost import Probe
from finetune.families import FAMILIES
from finetune.plan import Plan, plan
from tests.job import good


def value(figures: Plan, name: str) -> float:
    return figures.figure(name).value


def test_loading_needs_twice_the_largest_group_of_tensors_per_process() -> None:
    one = plan(load_recipe("qwen3_30b_legal"))
    stack = 128 * 2 * 768 * 2048 * 2 / 2**30  # gate and up of 128 experts in bf16
    assert value(one, "loading the base") == pytest.approx(2 * stack)
    four = plan(load_recipe("qwen3_30b_legal", "launch=ddp", "launch.devices=4"))
    assert value(four, "loading the base") == 4 * value(one, "loading the base")
    assert value(four, "libraries") == 4 * value(one, "libraries")
    most = max(value(four, name) for name in ("loading the base", "preparing rows", "merging"))
    assert value(four, "host memory") == most + value(four, "libraries")


def test_the_quickstart_loads_within_what_the_plan_says() -> None:
    # load_limit_gib of its train.json: resident 0.2866 GiB + 2 x the largest group = 0.3921 GiB, in fp32
    assert value(plan(load_recipe("legal_quickstart")), "loading the base") == pytest.approx(0.3921 - 0.2866, abs=0.02)


def test_workers_and_a_paged_optimizer_are_counted() -> None:
    recipe = good(data__workers=9, train__optimizer="paged_adamw_8bit")
    figures = plan(recipe)
    assert value(figures, "preparing rows") == pytest.approx(10 * 0.27)
    assert value(figures, "optimizer, paged out") == value(figures, "optimizer") > 0
    with pytest.raises(KeyError):
        plan(good()).figure("optimizer, paged out")


def test_ddp_holds_gradients_twice_and_fsdp2_does_not() -> None:
    names = [
        {part.name for part in memory.memory(load_recipe("qwen3_30b_legal", *words))}
        for words in ((), ("launch=ddp",), ("launch=fsdp2",))
    ]
    assert ["gradients on their way" in found for found in names] == [False, True, False]


def test_activations_are_shown_with_and_without_checkpointing_and_how_many_layers_recompute() -> None:
    recipe = load_recipe("qwen3_30b_legal", "data.max_length=4096", "train.batch_size=8")
    figures = plan(recipe)
    assert value(figures, "activations with checkpointing") == value(figures, "activations")
    assert value(figures, "activations without checkpointing") > 10 * value(figures, "activations")
    assert 0 < value(figures, "layers that recompute") <= 48
    recipe.train.gradient_checkpointing = False
    figures = plan(recipe)
    assert value(figures, "activations without checkpointing") == value(figures, "activations")
    assert value(figures, "layers that recompute") == 0
    recipe.train.gradient_checkpointing, recipe.train.checkpointed_layers = True, 7
    assert value(plan(recipe), "layers that recompute") == 7


def test_attention_scores_are_those_worked_out_by_hand() -> None:
    # 48 layers, 32 heads of 128, rows of 4,096 tokens: 1.61 GFLOP per token and forward pass
    recipe = load_recipe("qwen3_30b_legal", "data.max_length=4096")
    assert work.attention_per_token(recipe, 4096) == pytest.approx(1.61e9, rel=0.001)
    figures = plan(recipe)
    assert value(figures, "attention scores") == pytest.approx(4 * 1.61e9 * value(figures, "tokens"), rel=0.001)
    recipe.train.gradient_checkpointing = False
    assert value(plan(recipe), "attention scores") == pytest.approx(3 * 1.61e9 * value(figures, "tokens"), rel=0.001)


def test_low_rank_attention_counts_its_own_widths_of_heads() -> None:
    recipe = load_recipe("deepseek_v3_finance")  # 61 layers, 128 heads, 128 + 64 wide for keys and 128 for values
    assert work.attention_per_token(recipe, 100) == 61 * 128 * (128 + 64 + 128) * 100


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_attention_scores_host_memory_and_ways(family: str) -> None:
    figures = plan(good(model__family=family, model__tiny=True))
    assert value(figures, "attention scores") > 0 and value(figures, "merging") > 0
    assert value(figures, "proving the merge") == pytest.approx(value(figures, "parameters") * 4 / 2**30)


def test_the_proof_of_a_large_merge_needs_the_whole_base_in_bf16() -> None:
    figures = plan(load_recipe("llama4_70b_legal"))
    assert value(figures, "proving the merge") == pytest.approx(value(figures, "merged"))


def test_each_export_format_has_its_bytes() -> None:
    figures = plan(good(export__formats=["hf", "peft"]))
    assert value(figures, "export, hf") == value(figures, "merged")
    assert value(figures, "export, peft") == value(figures, "adapter") < value(figures, "merged")


def test_held_out_rows_are_those_of_recipe_card_or_prepared_data(tmp_path) -> None:
    assert work.heldout_rows(good(), None).value == 240  # the card
    assert work.heldout_rows(good(data__heldout_rows=30), None).value == 30
    assert work.heldout_rows(good(evaluate__rows=12, data__heldout_rows=30), None).value == 12
    assert work.heldout_rows(good(data__card="", data__train_files=["x.txt"]), None).basis == "assumed"
    (tmp_path / "report.json").write_text('{"splits": {"heldout": {"rows": 5}}}')
    assert work.heldout_rows(good(), tmp_path).value == 5


def test_evaluation_and_merge_are_rough_and_in_the_price_with_these() -> None:
    recipe = load_recipe("qwen3_30b_legal")
    figures = plan(recipe)
    hours = sum(value(figures, f) for f in ("device-hours", "evaluation, rough", "merge and export, rough"))
    assert value(figures, "price with these") == pytest.approx(hours * recipe.costs.price_per_hour)
    twice = 2 * 2 * value(figures, "active per token") * 240 * recipe.data.max_length / (989e12 * 0.25) / 3600
    assert value(figures, "evaluation, rough") == pytest.approx(twice)
    moved = sizes.weights_gib(recipe.model) + 2 * value(figures, "merged")
    assert value(figures, "merge and export, rough") == pytest.approx(moved / 0.5 / 3600)


def test_measured_steps_take_the_place_of_an_assumed_speed() -> None:
    probe = Probe(
        steps=3,
        seconds_per_step=7.2,
        tokens_per_second=100.0,
        tflops=0.5,
        peak_gib=2.0,
        device="a machine",
        when="2026-11-25",
    )
    figures = plan(good(data__train_rows=400, costs__price_per_hour=10.0), probe=probe)
    assert value(figures, "steps") == 100
    assert value(figures, "hours") == 100 * 7.2 / 3600
    assert figures.figure("hours").basis == "measured" and "measured here on a machine" in figures.figure("hours").how
    assert value(figures, "price") == 10.0 * value(figures, "hours")
    assert figures.figure("tokens per second").basis == figures.figure("device-hours").basis == "measured"
    assert plan(good()).figure("hours").basis == "assumed"


def test_each_export_format_of_a_server_has_its_own_size() -> None:
    recipe = good(export__formats=["hf", "peft_per_expert", "gguf", "ollama"], export__gguf=["f16", "q8_0"])
    recipe.export.gguf_adapter = True
    figures = plan(recipe)
    assert value(figures, "export, peft_per_expert") == 2 * value(figures, "adapter")
    assert value(figures, "export, gguf") == pytest.approx(value(figures, "merged") * (1 + 8.5 / 16))
    assert figures.figure("export, gguf").basis == "assumed" and value(figures, "export, ollama") < 0.001


def test_every_type_of_gguf_file_has_its_bits() -> None:
    assert set(disk.GGUF_BITS) == {*check.GGUF_TYPES, *check.GGUF_SMALL}
