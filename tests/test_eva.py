"""EVA: adapters begin at the main directions of what their maps are given, are ordinary files, and begin only once."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetune.adapters import attach, directions
from finetune.base import load_base
from finetune.check import problems
from finetune.compose import load_recipe
from finetune.errors import NumbersError
from finetune.recipe import Adapter
from finetune.run import run
from finetune.rundir import read_json
from finetune.train import beginning as beginnings
from tests.job import good
from tests.test_methods import logits, stock_peft, train_steps
from tests.tiny_models import checkpoint, some_ids


def a_batch(base: Any) -> dict[str, torch.Tensor]:
    """Four rows, one of them padded."""
    ids = some_ids(base, 4, 40)
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def given(base: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Path of every linear map -> what it is given for tokens that are no padding, in float64."""
    seen: dict[str, Any] = {}
    real = batch["attention_mask"].reshape(-1).bool()

    def note(name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            seen[name] = args[0].reshape(-1, args[0].shape[-1])[real].double().numpy()

        return hook

    maps = [(name, m) for name, m in base.model.named_modules() if isinstance(m, torch.nn.Linear)]
    handles = [m.register_forward_pre_hook(note(name)) for name, m in maps]
    with torch.no_grad():
        base.model(**batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("family", "in_4bit"), [("qwen3_moe", True), ("llama4", False)])
def test_a_begins_at_the_leading_singular_directions_of_what_its_map_is_given(family, in_4bit):
    """By numpy, in float64: the same directions, up to sign, of the same tokens with their mean taken off."""
    base = load_base(checkpoint(family, True), load_in_4bit=in_4bit, precision="fp32")
    adapter, batch = Adapter(targets="all", rank=6, expert_rank=2, init="eva"), a_batch(base)
    seen = given(base, batch)
    found = directions(base, adapter, [batch])
    again = directions(base, adapter, [batch])
    assert all(torch.equal(a, again[path]) for path, a in found.items())
    ranks = {path: len(a) for path, a in found.items()}
    assert sum(ranks.values()) == 6 * len(ranks)
    assert len(set(ranks.values())) > 2  # they went where they explain more
    model = attach(base, adapter, found)
    checked = 0
    for path, rank in ranks.items():
        layer = model.get_submodule(f"base_model.model.{path}")
        a = layer.lora_A["default"].weight.detach().double().numpy()
        assert a.shape[0] == rank
        assert layer.scaling["default"] == pytest.approx(32 / 6)  # whatever the rank became
        values = seen[path] - seen[path].mean(0)
        _, sizes, right = np.linalg.svd(values, full_matrices=False)
        explained = np.square(values @ a.T).sum()
        assert explained > 0.999 * np.square(sizes[:rank]).sum()
        assert np.abs((a * right[:rank]).sum(1)).min() > 0.99
        checked += 1
    assert checked == len(ranks)


def test_maps_that_explain_nothing_more_get_no_update_and_stock_peft_reads_the_file(tmp_path):
    base = load_base(checkpoint("deepseek_v3", True), load_in_4bit=False, precision="fp32")
    adapter, batch = Adapter(targets="all", rank=2, expert_rank=2, init="eva", eva_rho=8), a_batch(base)
    untouched = logits(base.model, batch["input_ids"])
    found = directions(base, adapter, [batch])
    without = {path for path, a in found.items() if not len(a)}
    assert any("mlp." in path for path in without) and len(without) < len(found)
    model = attach(base, adapter, found)
    torch.testing.assert_close(logits(model, batch["input_ids"]), untouched, rtol=1e-5, atol=1e-6)
    train_steps(model, batch["input_ids"])
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert not [key for key in keys for path in without if f"{path}.lora" in key]
    ours = logits(model, batch["input_ids"])
    assert (ours - untouched).abs().max() > 1e-3
    theirs = logits(stock_peft(base.folder, tmp_path), batch["input_ids"])
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_too_few_tokens_for_the_rank_end_with_a_sentence(monkeypatch, capsys):
    from finetune.adapters import eva

    monkeypatch.setattr(eva, "PASSES", 5)
    base = load_base(checkpoint("llama", True), load_in_4bit=False, precision="fp32")
    with pytest.raises(NumbersError, match="ADP-020 the directions of EVA still turn after 5 forward passes"):
        directions(base, Adapter(targets="attention", rank=16, init="eva"), [{"input_ids": some_ids(base, 1, 8)}])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"adapter": Adapter(init="eva", rank=40)}, "ADP-007 adapter.init=eva: self_attn.q_proj is given 64 .* = 80"),
        ({"adapter": Adapter(init="eva", eva_rho=0.5)}, "CHK-002 adapter.eva_rho"),
        (
            {"adapter": Adapter(init="eva"), "launch__devices": 2, "launch__distribution": "fsdp2"},
            "ADP-008 adapter.init=eva with launch.distribution=fsdp2",
        ),
    ],
)
def test_what_eva_cannot_do_is_said_before_the_weights_load(changes, sentence):
    (said,) = problems(good(**changes))
    assert re.match(sentence, said), said


def test_a_training_that_goes_on_begins_with_what_the_first_one_found(tmp_path, monkeypatch):
    places = (f"runs_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}", "train.max_steps=2", "train.save_steps=1")
    recipe = load_recipe(
        "qwen3_30b_legal", "scale=rehearsal", "adapter.init=eva", "adapter.rank=4", "data.packing=true", *places
    )
    done = run(recipe, until="train")
    file = done.adapter / "adapter_model.safetensors"
    told, first = read_json(done.train)["beginning"], file.read_bytes()
    begun = load_file(done.directions)
    assert told["init"] == "eva"
    assert told["ranks"] == {path: len(a) for path, a in begun.items()}
    assert "model.layers.1.mlp.experts.down_proj" in told["begun_by_default"]
    assert not [path for path in told["begun_by_default"] if "attn" in path]
    file.unlink()
    done.adapter.rename(tmp_path / "gone")

    def again(*_: Any) -> Any:
        raise AssertionError("the directions were computed a second time")

    monkeypatch.setattr(beginnings, "directions", again)
    run(recipe, run_dir=done, until="train")
    assert file.read_bytes() == first
    assert read_json(done.train)["resumed"][0]["after_step"] == 2
