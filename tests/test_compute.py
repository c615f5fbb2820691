"""How much was computed, by two methods, and what share of the original's compute that is."""

from __future__ import annotations

from typing import Any

import pytest

from finetune import sizes
from finetune.compose import load_recipe, recipe_names
from finetune.compute import compute, peak_tflops, per_token
from tests.job import TRAIN, good

H100 = "NVIDIA H100 80GB HBM3"


def trained(**changes: Any) -> dict[str, Any]:
    return TRAIN | changes


def test_flops_are_counted_by_the_parameters_that_a_token_meets() -> None:
    recipe = load_recipe("deepseek_v3_finance", "train.gradient_checkpointing=false")
    weights = sizes.matrices(recipe.model)
    active = sizes.active_parameters(weights)
    assert 36e9 < active < 38e9 < 0.1 * sizes.total_parameters(weights)
    adapter = sizes.active_lora_parameters(weights, sizes.family_of_card(recipe.model), recipe.adapter)
    told = compute(recipe, trained(tokens=100_000_000))["by_parameters"]
    assert told["flop"] == (4 * active + 6 * adapter) * 100_000_000
    assert told["flop"] == pytest.approx(1.5e19, rel=0.05)  # 4 x 37e9 x 1e8
    assert told["recompute_flop"] == 0


def test_recomputed_forward_passes_are_told_apart() -> None:
    recipe = load_recipe("deepseek_v3_finance", "train.gradient_checkpointing=true")
    told = compute(recipe, trained(tokens=7))["by_parameters"]
    assert (
        told["recompute_flop"]
        == per_token(recipe).forward * 7
        == told["flop"] - 7 * (per_token(recipe).backward + per_token(recipe).adapter)
    )


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        (H100, 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A10", None),
        ("cpu", None),
    ],
)
def test_a_peak_is_known_by_the_devices_name_or_not_at_all(device: str, peak: float | None) -> None:
    assert peak_tflops(device) == peak


def test_the_second_method_is_hours_by_peak_by_the_assumed_utilisation() -> None:
    told = compute(good(), trained(device=H100, seconds=1800.0, processes=2))["by_hours"]
    assert told["device_hours"] == 1.0
    assert told["flop"] == pytest.approx(989e12 * 3600 * 0.25)


@pytest.mark.parametrize(("share", "agrees"), [(1.0, True), (0.72, True), (0.65, False), (1.5, False), (1.4, True)])
def test_methods_that_differ_by_more_than_three_tenths_disagree(share: float, agrees: bool) -> None:
    recipe = good(train__gradient_checkpointing=True)
    flops = compute(recipe, trained(tokens=10**9))["by_parameters"]
    seconds = share * (flops["flop"] + flops["recompute_flop"]) / (989e12 * 0.25)
    told = compute(recipe, trained(tokens=10**9, device=H100, seconds=seconds))["by_hours"]
    assert told["agrees"] is agrees
    assert told["utilisation_reached"] == pytest.approx(0.25 / share)


def test_no_peak_is_invented_for_a_device_that_is_not_known() -> None:
    told = compute(good(), trained())["by_hours"]
    assert told["flop"] is told["agrees"] is told["peak_tflops"] is None
    assert told["how"] == "the peak of cpu is not known, so this method gives nothing"


def test_the_share_of_the_originals_compute_needs_a_published_number_of_tokens() -> None:
    recipe = load_recipe("deepseek_v3_finance")
    told = compute(recipe, trained(tokens=100_000_000))["original"]
    assert told["flop"] == pytest.approx(3.3e24, rel=0.02)
    assert told["share"] == pytest.approx(1.5e19 / 3.3e24, rel=0.06) and told["above_a_third"] is False
    assert "2412.19437" in told["source"]
    recipe.model.pretraining_tokens = 1e8
    assert compute(recipe, trained(tokens=100_000_000))["original"]["above_a_third"] is True
    recipe.model.pretraining_source = ""
    told = compute(recipe, trained(tokens=100_000_000))["original"]
    assert told["share"] is told["flop"] is told["above_a_third"] is None and "nobody has said" in told["how"]


def test_a_tiny_random_model_has_no_original() -> None:
    told = compute(load_recipe("deepseek_v3_finance", "scale=rehearsal"), trained())["original"]
    assert told["share"] is None and "random" in told["how"]


def test_every_model_card_with_a_number_of_tokens_says_where_it_was_read() -> None:
    models = [load_recipe(name).model for name in recipe_names()]
    told = [model for model in models if model.pretraining_tokens]
    assert len(told) >= 2
    assert all(model.pretraining_source for model in told)
    assert all(1e12 < model.pretraining_tokens < 1e14 for model in told)
