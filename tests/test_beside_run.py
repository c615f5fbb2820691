"""What may stand beside run=, what it changes, and what says so afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import events
from finetune.__main__ import main
from finetune.commands import Request, recipe_of
from finetune.compose import read_recipe
from finetune.errors import RecipeError, RunError
from finetune.run import carry_on, start
from finetune.rundir import RunDir, read_json
from tests.job import Stages, ready


@pytest.fixture
def begun(tmp_path: Path) -> RunDir:
    return carry_on(start(ready(tmp_path)), until="data", launch=Stages())


def typed(run_dir: RunDir, *words: str, verb: str = "run") -> None:
    recipe_of(Request(verb=verb, run=str(run_dir.path), settings=list(words)))


def test_settings_that_are_allowed_become_those_of_the_run_and_the_record_says_so(begun: RunDir) -> None:
    changed = {"launch.devices": [1, 2], "train.batch_size": [1, 8], "seed": [17, 18]}
    before = read_recipe(begun.recipe)
    changed["train.batch_size"][0], changed["seed"][0] = before.train.batch_size, before.seed
    words = [f"{key}={now}" for key, (_, now) in changed.items()]
    typed(begun, *words, "train.allow_changed=[world_size,settings,seed]")
    recipe = read_recipe(begun.recipe)
    assert (recipe.launch.devices, recipe.train.batch_size, recipe.seed) == (2, 8, 18)
    assert recipe.train.allow_changed == []
    (entry,) = read_json(begun.allowed)
    assert entry["names"] == ["world_size", "settings", "seed"] and entry["settings"] == changed
    (event,) = [event for event in events.events(begun) if event["what"] == "allowed"]
    assert event["settings"] == changed
    record = read_json(carry_on(begun, launch=Stages()).record)
    assert record["allowed"] == [entry] and record["recipe"]["launch"]["devices"] == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["launch.devices=2"], "run=PATH launch.devices=2 train.allow_changed=[world_size], or leave out run="),
        (["launch.nodes=2", "train.allow_changed=[seed]"], "launch.nodes=2 train.allow_changed=[seed,world_size],"),
        (["launch.distribution=fsdp2"], "launch.distribution=fsdp2 train.allow_changed=[distribution],"),
        (["train.precision=fp32"], "train.precision=fp32 train.allow_changed=[precision],"),
        (["seed=3"], "seed=3 train.allow_changed=[seed],"),
        (["train.adapter_of=last"], "train.adapter_of=last train.allow_changed=[settings],"),
        (
            ["adapter.rank=4", "train.allow_changed=[settings]"],
            "CFG-010 adapter.rank=4: a run keeps its settings. Leave",
        ),
        (["train.lrr=4", "train.allow_changed=[settings]"], "CFG-010 train.lrr=4: a run keeps its settings. Leave"),
        (["train.allow_changed=[sed]"], "LCH-003 train.allow_changed: sed is none of"),
        (["train.lr=-1", "train.allow_changed=[settings]"], "train.lr=-1"),
        (["train.lr=x", "train.allow_changed=[settings]"], "CFG-004 train.lr=x: expected a number"),
        (["train.lr=1,2", "train.allow_changed=[settings]"], "CFG-003 train.lr=1,2: one value is needed"),
    ],
)
def test_other_settings_are_refused_with_what_to_type_and_nothing_is_changed(
    begun: RunDir, words: list[str], told: str
) -> None:
    before = begun.recipe.read_bytes()
    with pytest.raises(RecipeError) as refused:
        typed(begun, *words)
    assert told.replace("PATH", str(begun.path)) in refused.value.sentence()
    assert begun.recipe.read_bytes() == before and not begun.allowed.exists()


def test_a_verb_that_carries_nothing_out_changes_no_settings(begun: RunDir) -> None:
    with pytest.raises(RecipeError, match=r"CFG-010 train\.lr=1e-5: a run keeps its settings"):
        typed(begun, "train.lr=1e-5", "train.allow_changed=[settings]", verb="plan")


def test_what_a_run_was_trained_with_stays(begun: RunDir) -> None:
    carry_on(begun, until="train", launch=Stages())
    with pytest.raises(RunError, match=r"RUN-006 .* is trained: train\.lr cannot change any more"):
        typed(begun, "train.lr=1e-5", "train.allow_changed=[settings]")
    lr = read_recipe(begun.recipe).train.lr
    typed(begun, f"train.lr={lr}", "train.allow_changed=[settings]")  # the value that it has


def test_settings_of_a_run_in_use_stay(begun: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with begun.lock():
        assert main([f"run={begun.path}", "train.lr=1e-5", "train.allow_changed=[settings]"]) == 3
    assert "RUN-003" in capsys.readouterr().err
    assert not begun.allowed.exists()
