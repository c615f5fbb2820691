"""ZeRO by DeepSpeed: what is refused, what it divides, and that checkpoints, stops and guards are those of every run.

That two processes learn what one does, and that a killed run goes on bit for bit, stands beside the other distributions
in test_ranks.py and test_resume.py.
"""

import os
import re
import signal
import tomllib
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from finetune import machine, memory
from finetune.check import CHANGEABLE, problems
from finetune.checkpoints import newest
from finetune.compose import load_recipe
from finetune.errors import RunError
from finetune.machine import DEEPSPEED
from finetune.rundir import read_json
from finetune.train.identity import changes
from finetune.train.rehearsal import moments
from tests.job import good
from tests.trained import ROOT, begun, ended, prepared, told, wait_for, with_deepspeed

ZERO = ("launch.distribution=deepspeed", "launch.devices=2", "train.batch_size=1", "train.precision=fp32")


def missing(name):
    raise metadata.PackageNotFoundError(name)


def test_a_missing_or_another_deepspeed_is_refused_with_what_to_type(monkeypatch):
    for version, said in ((missing, "the package deepspeed is missing"), (lambda _: "0.9", "deepspeed 0.9 is here, ")):
        monkeypatch.setattr(metadata, "version", version)
        (sentence,) = machine.launch_problems(good(launch__devices=2, launch__distribution="deepspeed"))
        assert sentence.startswith(f"LCH-011 launch.distribution=deepspeed: {said}")
        assert f"Type: pip install 'finetune[deepspeed]', which is deepspeed {DEEPSPEED}" in sentence
    assert machine.launch_problems(good(launch__distribution="deepspeed")) == []  # one process divides nothing


def test_a_job_on_another_machine_says_so_too(tmp_path, monkeypatch):
    from finetune.train.zero import start

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(RunError, match=r"LCH-011 launch.distribution=deepspeed: the package deepspeed is missing"):
        start(on_gpu=False)


def test_extra_lock_and_code_name_one_release():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["deepspeed"] == [f"deepspeed=={DEEPSPEED}"]
    assert f"\ndeepspeed=={DEEPSPEED} " in (ROOT / "tests" / "deepspeed.lock").read_text()


def test_one_file_imports_deepspeed():
    found = re.compile(r"^\s*(import|from) deepspeed\b", re.MULTILINE)
    modules = [path for path in (ROOT / "finetune").rglob("*.py") if found.search(path.read_text())]
    assert [path.name for path in modules] == ["zero.py"]


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "lion_8bit", "adafactor"])
def test_an_optimizer_whose_state_is_one_of_whole_rows_or_blocks_is_refused(optimizer):
    (found,) = problems(good(train__optimizer=optimizer, launch__devices=2, launch__distribution="deepspeed"))
    assert found.startswith(f"OPT-002 train.optimizer={optimizer} with launch.distribution=deepspeed")
    assert problems(good(train__optimizer=optimizer, launch__distribution="deepspeed")) == []


def test_a_checkpoint_in_parts_is_taken_up_by_the_same_processes_only():
    then = dict.fromkeys(CHANGEABLE, "x") | {"distribution": "deepspeed", "world_size": 2}
    for now, allowed in (({"world_size": 3}, ["world_size"]), ({"distribution": "ddp"}, ["distribution"])):
        for pair in ((then, then | now), (then | now, then)):
            with pytest.raises(RunError, match=rf"CKP-005 .*{allowed[0]}: .*its own part of the optimizer's state"):
                changes(*pair, allowed)
    assert changes(then, then | {"seed": "y"}, ["seed"]) == {"seed": "x is now y"}


def test_devices_divide_the_optimizer_and_the_gradients_and_hold_the_base_whole():
    words = ("qwen3_30b_legal", "launch.devices=4")
    ddp, zero = (
        {part.name: part.value for part in memory.memory(load_recipe(*words, f"launch={name}"))}
        for name in ("ddp", "deepspeed")
    )
    shares = {"optimizer": 1 / 4, "gradients": 2 / 4, "adapter weights": 1, "expert stacks, 4-bit": 1}
    for name, share in shares.items():
        assert zero[name] == pytest.approx(ddp[name] * share), name
    assert zero["adapter weights, a copy of its part"] == pytest.approx(ddp["adapter weights"] / 4)
    assert zero["gradients on their way"] == memory.BUCKET * 4 / 2**30
    assert sum(zero.values()) < sum(ddp.values())


def test_the_optimizer_is_imitated_in_the_parts_that_it_has():
    model, part = torch.nn.Linear(3, 5), torch.zeros(8)
    optimizer = SimpleNamespace(state={}, param_groups=[{"params": [part]}])
    assert [tuple(tensor.shape) for tensor in moments(model, optimizer)] == [(8,), (8,)]


def deepspeed(test):
    """Marks a test that trains with DeepSpeed."""
    for mark in with_deepspeed:
        test = mark(test)
    return test


@deepspeed
def test_two_processes_stop_together_and_go_on_and_leave_no_pickle(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    words = (*ZERO, "train.max_steps=24", "train.save_steps=3")
    straight, stopped = prepared(tmp_path, *words), prepared(tmp_path, *words)
    code, said = ended(begun(straight, typed=True))
    assert code == 0, said
    process = begun(stopped, typed=True)
    wait_for(process, stopped, 3)
    os.kill(process.pid, signal.SIGTERM)
    code, said = ended(process)
    assert code == 75, said
    step = newest(stopped.checkpoints).checkpoint.step
    assert f"stopped by SIGTERM after step {step} of 24" in said
    code, said = ended(begun(stopped, typed=True))
    assert code == 0, said
    assert told(stopped) == told(straight)
    folder = next(straight.checkpoints.glob("step-*"))
    parts = [f"rank-000{rank}.safetensors" for rank in (0, 1)]
    files = ["manifest.json", "memory.json", *parts, "scheduler.json", "trainer_state.json", "weights.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert not (tmp_path / "compiled").exists()
    assert read_json(straight.train)["versions"]["deepspeed"] == DEEPSPEED


@deepspeed
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("silent", r"TRN-001 no gradient reaches \['.*q_proj'\]"),
        ("infinite", "NUM-001 grad_norm is inf at step 3, of rows "),
    ],
)
def test_gradients_that_are_missing_or_infinite_end_all_processes(tmp_path, monkeypatch, fault, said):
    monkeypatch.setenv("ZERO_FAULT", fault)
    run_dir = prepared(tmp_path, *ZERO, "train.max_steps=6", "train.save_steps=1")
    code, words = ended(begun(run_dir, "tests.zero_fault", 2, typed=True))
    assert code != 0
    assert len(re.findall(said, words)) == 2, words
    kept = newest(run_dir.checkpoints).checkpoint
    assert (kept.step if kept else 0) == (0 if fault == "silent" else 2)
