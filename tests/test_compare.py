"""What a plan says of memory, against what is resident: on tiny models of several families, and the quickstart's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.compare import Row, compare
from finetune.compose import load_recipe
from finetune.plan import plan
from finetune.recipe import Recipe
from tests.job import good
from tests.tiny_models import checkpoint

RESULTS = Path(__file__).resolve().parents[1] / "scripts" / "bench_results"
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4", "olmoe", "glm4_moe")


def measured(recipe: Recipe) -> dict[str, Any]:
    """What train.json would say of a base, its adapter and an optimizer after one update."""
    import torch

    from finetune.adapters import attach, coverage_table
    from finetune.base import load_base
    from finetune.train.optimizer import optimizer_name
    from finetune.train.results import held_gib

    adapter, precision = recipe.adapter, recipe.train.precision
    base = load_base(
        checkpoint(recipe.model.family),
        load_in_4bit=adapter.load_in_4bit,
        precision=precision,
        double_quantisation=adapter.double_quantisation,
    )
    resident = base.resident_gib
    model = attach(base, adapter)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert optimizer_name(recipe.train) == "adamw_torch_fused"
    optimizer = torch.optim.AdamW(trained, fused=True)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "coverage": coverage_table(model, base.family),
        "resident_gib": resident,
        "optimizer_gib": held_gib(optimizer),
        "peak_memory_gib": 1.0,
        "device": "cpu",
        "steps": [],
        "tokens": 0,
        "seconds": 0.0,
    }


def rows(recipe: Recipe, train: dict[str, Any]) -> dict[str, Row]:
    return {row.name: row for row in compare(plan(recipe).as_json(), train)}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_adapter_and_optimizer_are_planned_to_five_per_cent_of_what_is_resident(family: str) -> None:
    for double, precision in ((False, "fp32"), (True, "bf16")):
        recipe = good(model__family=family, model__tiny=True, train__precision=precision)
        recipe.adapter.double_quantisation, recipe.adapter.targets = double, "all"
        found = rows(recipe, measured(recipe))
        assert set(found) == {"weights at rest", "what is trained", "optimizer", "peak while training"}
        for name in ("weights at rest", "what is trained", "optimizer"):
            assert abs(found[name].error) < 0.05, found[name].sentence()
        assert abs(found["what is trained"].error) < 1e-9


def test_a_plan_of_another_adapter_is_not_within_five_per_cent() -> None:
    recipe = good(model__tiny=True, train__precision="fp32")
    train = measured(recipe)
    recipe.adapter.rank, recipe.adapter.load_in_4bit = 24, False
    found = rows(recipe, train)
    assert found["what is trained"].error > 0.05 and found["optimizer"].error > 0.05
    assert found["weights at rest"].error > 0.5


def test_the_quickstarts_plan_is_within_five_per_cent_of_what_its_training_measured() -> None:
    kept = json.loads((RESULTS / "plan_legal_quickstart_amd-epyc-2-cores.json").read_text())
    recipe = load_recipe("legal_quickstart", f"train.precision={kept['precision']}")
    found = rows(recipe, kept["train"])
    for name in ("weights at rest", "what is trained", "optimizer"):
        assert abs(found[name].error) < 0.05, found[name].sentence()
        assert found[name].measured > 0.01
    older = json.loads((RESULTS / "legal_quickstart_amd-epyc-2-cores.json").read_text())["training"]
    bf16 = load_recipe("legal_quickstart", "train.precision=bf16")
    at_rest = rows(bf16, kept["train"] | {"resident_gib": older["resident_gib"]})["weights at rest"]
    assert abs(at_rest.error) < 0.05, at_rest.sentence()


def test_an_error_is_planned_over_measured_less_one() -> None:
    row = Row(name="a", planned=1.05, measured=1.0, unit="GiB", how="by hand")
    assert row.error == pytest.approx(0.05)
    assert row.sentence() == "a: planned 1.05 GiB, measured 1 GiB (+5.0%)"
    assert Row(name="a", planned=1, measured=0, unit="", how="").as_json()["error"] is None
    assert Row(name="a", planned=0, measured=0, unit="", how="").error == 0


def test_a_gpus_peak_is_compared_without_the_reserve_and_parts_of_a_base_not_at_all() -> None:
    recipe = good(model__tiny=True)
    figures = plan(recipe)
    train = {
        "coverage": [{"trainable": 10}],
        "resident_gib": 1.0,
        "peak_memory_gib": 1.0,
        "device": "NVIDIA H100",
        "steps": [{}],
        "tokens": 5,
        "seconds": 3600.0,
        "distribution": "fsdp2",
    }
    found = rows(recipe, train)
    assert set(found) == {"peak while training", "steps", "tokens", "hours"}
    whole = figures.figure("memory").value - figures.figure("reserve").value
    assert found["peak while training"].planned == pytest.approx(whole)
    assert rows(recipe, train | {"device": "cpu"})["peak while training"].planned == pytest.approx(whole + 1.5)
    assert found["hours"].measured == 1.0 and found["hours"].planned == figures.figure("hours").value
