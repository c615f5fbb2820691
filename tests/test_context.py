"""Rows that several processes share: what they learn is what one process learns of whole rows, and what cannot be."""

import json
import os
import re
import signal

import pytest
from safetensors.torch import load_file

from finetune import memory, work
from finetune.check import CHANGEABLE, problems
from finetune.checkpoints import newest
from finetune.compose import load_recipe
from finetune.context import undivided
from finetune.errors import RunError
from finetune.families import FAMILIES
from finetune.ranks import Ranks
from finetune.rundir import read_json
from finetune.train.identity import changes
from tests.job import good
from tests.trained import ADAPTER, begun, ended, kill_after, prepared, told, wait_for, with_deepspeed
from tests.warm import Forked

SAME = ("train.precision=fp32", "train.max_steps=4", "train.save_steps=4", "train.accumulation=2")
SHARED = ("launch.devices=2", "launch.context_parallel=2")
HELD_OUT = ("train.evaluate_steps=2", "evaluate.batch_size=8")


TINY = dict(FAMILIES["mixtral"].tiny)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"devices": 3}, "LCH-013 launch.context_parallel=2 with launch.devices=3: .* Set launch.devices=4, "),
        ({"context_parallel": 4, "devices": 4}, "LCH-013 .*4 heads of queries and 2 of keys .* by 4. .*=2, or 1; "),
        ({"context_parallel": 0}, "CHK-002 launch.context_parallel=0 must be at least 1"),
        ({"train__router_aux_loss_coef": 0.01}, "LCH-014 train.router_aux_loss_coef=0.01 .* Set .*_coef=0."),
        ({"train__neftune_alpha": 5.0}, "LCH-014 train.neftune_alpha=5 .* Set train.neftune_alpha=0."),
        ({"config": {"sliding_window": 4096}}, "LCH-013 .*looks back over a window of 4,096 tokens .*=1; long rows"),
        ({"config": {"rope_scaling": {"type": "dynamic"}}}, r"LCH-013 .*depend on the length of the row \(rope_type="),
        ({"family": "llama4"}, "LCH-013 .*llama4 cannot be divided along a row: some of its layers look back within"),
        ({"family": "gpt_oss"}, "LCH-013 .*gpt_oss cannot be divided along a row"),
        ({"family": "qwen3_5_moe"}, "LCH-013 .*qwen3_5_moe cannot be divided along a row"),
        ({"family": "deepseek_v32"}, "LCH-013 .*deepseek_v32 cannot be divided along a row"),
        ({"family": "deepseek_v4"}, "LCH-013 .*deepseek_v4 cannot be divided along a row"),
    ],
)
def test_what_cannot_share_a_row_is_refused_with_what_to_type(other, said):
    config = TINY | other.pop("config", {})
    if family := other.pop("family", ""):
        other |= {"model__family": family, "adapter__targets": "attention"}
        config = dict(FAMILIES[family].tiny)
    launch = {"devices": 2, "context_parallel": 2}
    launch |= {name: other.pop(name) for name in list(other) if name in launch}
    recipe = good(model__config=config, **{f"launch__{name}": value for name, value in launch.items()}, **other)
    (found,) = problems(recipe)
    assert re.match(said, found), found
    recipe.launch.context_parallel = 1
    assert problems(recipe) == []


def test_what_can_share_a_row_is_not_refused():
    assert problems(good(launch__devices=4, launch__context_parallel=2)) == []
    assert problems(good(launch__devices=2, launch__context_parallel=2, data__packing=True)) == []
    unused = TINY | {"sliding_window": 4096, "use_sliding_window": False}
    assert undivided(FAMILIES["mixtral"], unused, 2) == ""


def test_a_folder_that_the_card_does_not_describe_is_refused_before_it_is_loaded(tmp_path):
    from finetune.train.shared_rows import require_shareable

    (tmp_path / "config.json").write_text(json.dumps(TINY | {"sliding_window": 64}))
    require_shareable(tmp_path, Ranks())
    with pytest.raises(RunError, match=r"LCH-013 launch.context_parallel=2: .*a window of 64 tokens"):
        require_shareable(tmp_path, Ranks(0, 2, None, 2))


def test_who_shares_what():
    ranks = [Ranks(rank, 4, None, 2) for rank in range(4)]
    assert [(one.reader, one.readers) for one in ranks] == [(0, 2), (0, 2), (1, 2), (1, 2)]


def test_the_plan_counts_rows_once_and_parts_of_rows():
    words = ("qwen3_30b_legal", "launch=ddp", "launch.devices=4")
    apart, shared = load_recipe(*words), load_recipe(*words, "launch.context_parallel=4")
    parts = [{part.name: part.value for part in memory.memory(recipe)} for recipe in (apart, shared)]
    for name, value in parts[0].items():
        share = 1 / 4 if name in ("activations", "logits") else 1
        assert parts[1][name] == pytest.approx(value * share), name
    rows = [{part.name: part for part in work.work(recipe, None)}["rows per update"] for recipe in (apart, shared)]
    assert rows[1].value * 4 == rows[0].value
    assert rows[1].how.startswith("4 devices / 4 that share a row x ")


def test_rows_shared_otherwise_are_another_run():
    then = dict.fromkeys(CHANGEABLE, "x") | {"distribution": "ddp"}
    now = then | {"distribution": "ddp, 2 to a row"}
    with pytest.raises(RunError, match=r"CKP-002 .*distribution: ddp is now ddp, 2 to a row"):
        changes(then, now, [])
    assert changes(then, now, ["distribution"]) == {"distribution": "ddp is now ddp, 2 to a row"}


@pytest.mark.slow
def test_every_family_gives_each_process_its_part_of_what_one_computes(tmp_path):
    out = tmp_path / "found"
    code, said = ended(Forked("tests.trained", ["tests.shared_rows", "2", str(out)]))
    assert code == 0, said
    parts = [json.loads((tmp_path / f"found-{rank}").read_text()) for rank in (0, 1)]
    assert parts[0].keys() == parts[1].keys() == {key for key, family in FAMILIES.items() if not family.undivided}
    assert len(parts[0]) == 9
    for part in parts:
        for key, found in part.items():
            assert found.pop("lengths") == [7], key  # of 13 tokens
            assert (found.pop("first document") > 1) == (part is parts[0]), key
            assert max(found.pop("padded kept"), found.pop("packed kept")) < 0.6, key
            assert max(found.values()) < 1e-6, (key, found)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run_dir = prepared(tmp_path_factory.mktemp("alone"), *SAME, *HELD_OUT, "train.batch_size=4")
    code, said = ended(begun(run_dir))
    assert code == 0, said
    return run_dir


def agree(shared, alone):
    """Losses to 1e-6, and everything that is counted; the adapter too."""
    for a, b in zip(told(shared), told(alone), strict=True):
        assert a[1] == pytest.approx(b[1], abs=1e-6)
        assert a[2] == pytest.approx(b[2], abs=1e-5)
    one, two = (load_file(run.adapter / ADAPTER) for run in (alone, shared))
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-6
    a, b = (read_json(run.train) for run in (shared, alone))
    for name in ("expert_rows_with_a_gradient", "router", "rows", "passes", "tokens", "trainable_tokens"):
        assert a[name] == b[name], name
    assert [step["tokens"] for step in a["steps"]] == [step["tokens"] for step in b["steps"]]
    for x, y in zip(a["heldout"], b["heldout"], strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("distribution", "module"),
    [("ddp", "finetune"), ("fsdp2", "tests.fsdp_on_cpu")],
)
def test_two_processes_that_share_rows_learn_what_one_does(tmp_path, alone, distribution, module, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    words = (*SAME, *SHARED, *HELD_OUT, "train.batch_size=4", f"launch.distribution={distribution}")
    run_dir = prepared(tmp_path, *words)
    code, said = ended(begun(run_dir, module, 2))
    assert code == 0, said
    sum_of_rows = "2 devices / 2 that share a row x 4 rows x 2 accumulated = 8 rows per update"
    assert sum_of_rows in " ".join(said.split())
    agree(run_dir, alone)
    assert [step[4] for step in told(run_dir)] == [step[4] for step in told(alone)]  # digests of whole batches
    written = read_json(run_dir.train)
    assert (written["processes"], written["processes_per_row"], written["distribution"]) == (2, 2, distribution)


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["ddp", pytest.param("deepspeed", marks=with_deepspeed)])
def test_two_pairs_read_different_rows(tmp_path, alone, distribution):
    words = (
        "launch.devices=4",
        "launch.context_parallel=2",
        "train.batch_size=2",
        *HELD_OUT[:1],
        "evaluate.batch_size=8",
    )
    run_dir = prepared(tmp_path, *SAME, *words, f"launch.distribution={distribution}")
    code, said = ended(begun(run_dir, typed=distribution == "deepspeed"))
    assert code == 0, said
    assert "4 devices / 2 that share a row x 2 rows x 2 accumulated = 8 rows per update" in " ".join(said.split())
    agree(run_dir, alone)


PACKED = ("train.precision=fp32", "data.packing=true", "train.batch_size=3", "train.gradient_checkpointing=true")
"""Of four sequences, so that every second batch is of one row."""


@pytest.mark.slow
def test_packed_rows_and_a_batch_that_is_not_full_are_learnt_as_by_one_process(tmp_path):
    words = (*PACKED, "train.max_steps=4", "train.save_steps=4")
    one, shared = prepared(tmp_path, *words), prepared(tmp_path, *words, *SHARED)
    for run_dir in (one, shared):
        code, said = ended(begun(run_dir))
        assert code == 0, said
    assert read_json(one.train)["rows"] == 4
    agree(shared, one)
    assert [step[4] for step in told(shared)] == [step[4] for step in told(one)]


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["ddp", pytest.param("deepspeed", marks=with_deepspeed)])
def test_packed_rows_that_are_killed_and_stopped_go_on_bit_for_bit(tmp_path, distribution):
    words = (*PACKED, *SHARED, "train.max_steps=24", "train.save_steps=3", f"launch.distribution={distribution}")
    straight, broken = prepared(tmp_path, *words), prepared(tmp_path, *words)
    typed = distribution == "deepspeed"  # nothing is known of it in a fork
    code, said = ended(begun(straight, typed=typed))
    assert code == 0, said
    kill_after(begun(broken, typed=typed), broken, 3)
    process = begun(broken, typed=True)
    wait_for(process, broken, newest(broken.checkpoints).checkpoint.step + 3)
    os.kill(process.pid, signal.SIGTERM)
    code, said = ended(process)
    assert code == 75, said
    assert re.search(r"stopped by SIGTERM after step \d+ of 24", said)
    code, said = ended(begun(broken, typed=typed))
    assert code == 0, said
    assert told(broken) == told(straight)
    assert (broken.adapter / ADAPTER).read_bytes() == (straight.adapter / ADAPTER).read_bytes()
    a, b = (read_json(run.train) for run in (broken, straight))
    assert a["expert_rows_with_a_gradient"] == b["expert_rows_with_a_gradient"]
    assert a["router"] == b["router"]
    assert len(a["resumed"]) == 2
