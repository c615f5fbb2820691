"""Optimizers: what state they keep, which weights learn how fast, and that their state can be saved and loaded."""

from typing import Any

import pytest
import torch

from finetune import machine, memory
from finetune.errors import RecipeError
from finetune.recipe import Adapter
from finetune.run import refuse
from finetune.train.optimizer import NAMES, loraplus
from tests.job import good, ready
from tests.test_objective import trainer_of

WIDE = Adapter(rank=64, expert_rank=64)
"""Wide enough that a factor has more than 4096 numbers: below, 8-bit optimizers keep 32 bits."""


def made(tmp_path: Any, **changes: Any) -> tuple[Any, Any]:
    """(trainer, its optimizer after one update)."""
    trainer, _ = trainer_of("mixtral", tmp_path, train__max_steps=1, **({"adapter": WIDE} | changes))
    trainer.args.max_steps = 1
    trainer.train()
    return trainer, trainer.optimizer.optimizer


def test_every_optimizer_that_can_be_chosen_is_known_to_transformers_and_counted_in_memory():
    from dataclasses import fields

    from transformers.training_args import OptimizerNames

    from finetune.recipe import Train

    choices = next(f for f in fields(Train) if f.name == "optimizer").metadata["choices"]
    assert set(choices) == set(NAMES) == set(memory.STATE_BYTES)
    assert set(NAMES.values()) <= {name.value for name in OptimizerNames}


@pytest.mark.parametrize("optimizer", [name for name in NAMES if not name.startswith("paged_")])
@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_state_has_the_size_that_the_plan_counts_and_can_be_saved_and_loaded(optimizer, ratio, tmp_path):
    adapter = Adapter(rank=64, expert_rank=64, lora_plus_ratio=ratio)
    trainer, inner = made(tmp_path, train__optimizer=optimizer, adapter=adapter)
    assert isinstance(inner, torch.optim.Optimizer)
    large = [p for p in trainer.model.parameters() if p.requires_grad and p.numel() >= 4096]
    assert len(large) >= 8
    for parameter in large:
        state = {key: v for key, v in inner.state[parameter].items() if torch.is_tensor(v) and v.numel() > 1}
        kept = sum(v.numel() * v.element_size() for key, v in state.items() if not key.startswith("qmap"))
        assert kept == pytest.approx(memory.STATE_BYTES[optimizer] * parameter.numel(), rel=0.02, abs=4 * 4096 * 0.6)
        moments = [v.dtype for v in state.values() if v.shape == parameter.shape]
        assert set(moments) <= {torch.uint8 if optimizer.endswith("8bit") else torch.float32}
        assert len(moments) == {"adamw": 2, "adamw_8bit": 2, "lion": 1, "lion_8bit": 1, "adafactor": 0}[optimizer]
    torch.save(inner.state_dict(), tmp_path / "optimizer.pt")
    saved = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    other, again = made(tmp_path, train__optimizer=optimizer, adapter=adapter)
    again.load_state_dict(saved)
    for one, two in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        for key, value in inner.state[one].items() if one.requires_grad else ():
            if torch.is_tensor(value):
                assert torch.equal(value, again.state[two][key]), key


def test_b_learns_as_many_times_faster_than_a_as_asked_and_both_follow_the_schedule(tmp_path):
    """By what AdamW's first step is: every number with a gradient moves by the learning rate."""
    adapter = Adapter(targets="attention", rank=4, lora_plus_ratio=8.0, init="orthogonal")
    trainer, ids = trainer_of("mixtral", tmp_path, adapter=adapter, train__lr=1e-3, train__schedule="linear")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.create_optimizer_and_scheduler(num_training_steps=4)
    rates = {g["lr"] for g in trainer.optimizer.param_groups if g["params"]}
    assert rates == {1e-3, 8e-3}
    trainer.model.train()(input_ids=ids, labels=ids).loss.backward()
    trainer.optimizer.step()
    moved = {name: (p - before[name]).abs().median() for name, p in trainer.model.named_parameters() if name in before}
    for name, step in moved.items():
        assert step.item() == pytest.approx(8e-3 if ".lora_B." in name else 1e-3, rel=1e-2), name
    trainer.lr_scheduler.step()
    rates = {g["lr"] for g in trainer.optimizer.param_groups if g["params"]}
    assert sorted(rates) == pytest.approx([0.75e-3, 6e-3])


def test_without_a_ratio_the_optimizer_is_transformers_own():
    assert loraplus(good().train, None, 1.0) is None


def test_weight_decay_reaches_both_factors_with_and_without_a_ratio(tmp_path):
    for ratio in (1.0, 4.0):
        adapter = Adapter(targets="attention", rank=4, lora_plus_ratio=ratio)
        trainer, _ = trainer_of("mixtral", tmp_path, adapter=adapter, train__weight_decay=0.1)
        trainer.create_optimizer()
        decay = {id(p): g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
        assert {decay[id(p)] for p in trainer.model.parameters() if p.requires_grad} == {0.1}


def test_a_paged_optimizer_is_refused_where_there_is_no_gpu(monkeypatch, tmp_path):
    recipe = ready(tmp_path, train__optimizer="paged_adamw_8bit")
    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    with pytest.raises(
        RecipeError, match=r"OPT-001 train.optimizer=paged_adamw_8bit: .* Set train.optimizer=adamw_8bit"
    ):
        refuse(recipe)
    monkeypatch.setattr(machine, "gpu_count", lambda: 1)
    refuse(recipe)


def test_memory_counts_the_optimizers_state():
    parts = {name: memory.memory(good(train__optimizer=name)) for name in NAMES}
    sizes = {name: next(p.value for p in found if p.name == memory.OPTIMIZER) for name, found in parts.items()}
    assert sizes["adamw_8bit"] == pytest.approx(sizes["adamw"] * 2 * (1 + 4 / 256) / 8)
    assert sizes["adafactor"] == 0
    values, gradients = ({p.name: p.value for p in parts["adamw"]}[name] for name in (memory.ADAPTER, memory.GRADIENTS))
    assert values == gradients == sizes["adamw"] / 2
