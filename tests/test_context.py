"""Rows that several processes share: what they learn is what one process learns of whole rows, and what cannot be."""

import json
import os
import re
import signal

import pytest
from safetensors.torch import load_file

from finetune import memory, work
from finetune.check import problems
from finetune.checkpoints import newest
from finetune.compose import load_recipe
from finetune.context import undivided
from finetune.errors import RunError
from finetune.families import FAMILIES
from finetune.ranks import Ranks
from finetune.rundir import read_json
from tests.job import good
from tests.trained import ADAPTER, begun, ended, kill_after, prepared, told, wait_for, with_deepspeed
from tests.warm import Forked

SAME = ("train.precision=fp32", "train.max_steps=4", "train.save_steps=4", "train.accumulation=2")
SHARED = ("launch.devices=2", "launch.context_parallel=2")
HELD_OUT = ("train.evaluate_steps=2", "evaluate.batch_size=8")


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
    [
        ("ddp", "finetune"),
        ("fsdp2", "tests.fsdp_on_cpu"),
        pytest.param("deepspeed", "finetune", marks=with_deepspeed),
    ],
)
def test_two_processes_that_share_rows_learn_what_one_does(tmp_path, alone, distribution, module, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    words = (*SAME, *SHARED, *HELD_OUT, "train.batch_size=4", f"launch.distribution={distribution}")
    run_dir = prepared(tmp_path, *words)
    code, said = ended(begun(run_dir, module, 2, typed=distribution == "deepspeed"))
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
    words = ("launch.devices=4", "launch.context_parallel=2", "train.batch_size=2", *HELD_OUT[:1], "evaluate.batch_size=8")
    run_dir = prepared(tmp_path, *SAME, *words, f"launch.distribution={distribution}")
    code, said = ended(begun(run_dir, typed=distribution == "deepspeed"))
    assert code == 0, said
    assert "4 devices / 2 that share a row x 2 rows x 2 accumulated = 8 rows per update" in " ".join(said.split())
    agree(run_dir, alone)


@pytest.mark.slow
def test_packed_rows_that_are_killed_and_stopped_go_on_bit_for_bit(tmp_path):
    words = ("train.max_steps=24", "train.save_steps=3", "train.precision=fp32", "data.packing=true")
    words = (*words, "train.batch_size=2", "train.gradient_checkpointing=true")
    one, straight, broken = (prepared(tmp_path, *words, *more) for more in ((), SHARED, SHARED))
    for run_dir in (one, straight):
        code, said = ended(begun(run_dir))
        assert code == 0, said
    agree(straight, one)
    kill_after(begun(broken), broken, 3)
    process = begun(broken, typed=True)
    wait_for(process, broken, newest(broken.checkpoints).checkpoint.step + 3)
    os.kill(process.pid, signal.SIGTERM)
    code, said = ended(process)
    assert code == 75, said
    assert re.search(r"stopped by SIGTERM after step \d+ of 24", said)
    code, said = ended(begun(broken))
    assert code == 0, said
    assert told(broken) == told(straight)
    assert (broken.adapter / ADAPTER).read_bytes() == (straight.adapter / ADAPTER).read_bytes()
    a, b = (read_json(run.train) for run in (broken, straight))
    assert a["expert_rows_with_a_gradient"] == b["expert_rows_with_a_gradient"]
    assert a["router"] == b["router"]
    assert len(a["resumed"]) == 2
