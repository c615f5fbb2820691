"""The longest batch before step 1: what it refuses, and that it leaves no trace."""

from __future__ import annotations

import errno
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from finetune import checkpoints, machine
from finetune.__main__ import main
from finetune.compose import load_recipe
from finetune.errors import FinetuneError
from finetune.failures import out_of_memory
from finetune.recipe import Data, Recipe, Train
from finetune.run import run
from finetune.rundir import RunDir, read_json
from finetune.train.rehearsal import (
    Meter,
    check_disk,
    cut,
    evaluation_sets,
    longest_row,
    moments,
    parts,
    predicted,
    too_little,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """words -> the run of a rehearsal up to training, each in its own folder."""
    root = tmp_path_factory.mktemp("runs")

    def make(*words, until="train"):
        places = (f"runs_dir={root}", f"cache_dir={root / 'cache'}")
        return run(load_recipe("legal_quickstart", "scale=rehearsal", *places, *words), until=until)

    return make


@pytest.mark.parametrize(
    "words",
    [
        ("adapter.targets=attention", "adapter.dropout=0.3", "train.accumulation=2"),
        ("train.gradient_checkpointing=true", "train.report_to=[]"),
        ("data.packing=true",),
    ],
    ids=["dropout", "experts", "packed"],
)
def test_a_run_is_the_same_to_the_bit_with_and_without_a_rehearsal(rehearsed, words):
    found = [rehearsed(*words, f"train.rehearse_memory={value}") for value in ("true", "false")]
    weights = [(one.adapter / "adapter_model.safetensors").read_bytes() for one in found]
    assert weights[0] == weights[1]
    told = [read_json(one.train) for one in found]
    for name in ("loss", "lr", "grad_norm", "tokens"):
        assert [step[name] for step in told[0]["steps"]] == [step[name] for step in told[1]["steps"]]
    for name in ("router", "expert_rows_with_a_gradient", "experts_without_update", "tokens"):
        assert told[0][name] == told[1][name]
    assert told[0]["rehearsal"]["rows"] == 2 and told[0]["rehearsal"]["tokens"] > 50
    assert told[1]["rehearsal"] == {}


@pytest.mark.slow
def test_what_trackers_get_is_the_same_with_and_without_a_rehearsal(rehearsed):
    """TRL adds up tokens and accuracies of every batch that it sees: those of the rehearsal must not be among them."""
    from tests.test_trackers import curves

    found = [curves(rehearsed(f"train.rehearse_memory={value}").logs) for value in ("true", "false")]
    for name in ("train/num_tokens", "train/mean_token_accuracy", "train/entropy", "train/loss"):
        assert found[0][name] == found[1][name]


@pytest.mark.parametrize(("free_gib", "tried"), [(1000.0, 16), (0.2, 64)])
def test_the_whole_batch_is_left_out_only_where_twice_as_much_would_fit(rehearsed, monkeypatch, free_gib, tried):
    monkeypatch.setattr("finetune.train.rehearsal.available_gib", lambda: free_gib)
    words = ("train.batch_size=64", "train.max_steps=1", "train.precision=fp32")  # bf16 takes half of it
    told = read_json(rehearsed(*words).train)["rehearsal"]
    assert told["rows"] == 64 and told["tried_rows"] == tried
    assert 0.05 < told["growth_gib"] < 0.5  # 0.13 GiB, tried or foreseen


BLIND = "rehearsal.predicted = lambda grown, tokens: 0.0"
LIMITED = """
import resource, sys
from finetune import worker
from finetune.train import rehearsal, stage
made = rehearsal.Rehearsal.on_train_begin
def limited(self, *args, **kwargs):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (200 << 20),) * 2)
    {blind}
    made(self, *args, **kwargs)
rehearsal.Rehearsal.on_train_begin = limited
sys.exit(worker.main(["train", sys.argv[1]]))
"""


@pytest.mark.parametrize(("foreseen", "how"), [(True, " peaks at "), (False, " needs more than ")])
def test_too_little_memory_ends_the_run_before_step_one_in_a_sentence(rehearsed, foreseen, how):
    """In 200 MiB the small parts fit and say that the whole will not; and an allocation that fails is understood."""
    words = ("train.batch_size=4096", "train.accumulation=2", "train.precision=fp32")  # oneDNN crashes without memory
    prepared = rehearsed(*words, until="data")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.replace("{blind}", "" if foreseen else BLIND), str(prepared.path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("MEM-001 longest batch (4096 x ") and how in done.stderr, done.stderr
    assert "Try: train.batch_size=2048 train.accumulation=4" in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert "step 1/" not in done.stdout
    assert not prepared.adapter.exists() and not any(prepared.logs.glob("events*"))


def test_memory_that_runs_out_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as no_room:
        torch.empty(1 << 56, dtype=torch.uint8)
    recipe = Recipe(train=Train(batch_size=1))
    meter = Meter()
    said = r"MEM-001 a batch needs more than .* of .*GiB: .* Try: train.gradient_checkpointing=true"
    with pytest.raises(FinetuneError, match=said), meter.refusing("a batch", recipe):
        raise no_room.value
    assert out_of_memory(MemoryError()) and not out_of_memory(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"), meter.refusing("a batch", recipe):
        raise RuntimeError("shapes differ")


def test_the_growth_of_a_batch_is_on_the_line_through_smaller_ones():
    assert predicted([(32, 0.5), (64, 0.6), (256, 1.2)], 1024) == pytest.approx(3.6)
    assert predicted([(32, 0.5), (64, 0.5)], 1024) == 0.5  # a constant cost says nothing of larger batches
    meter = Meter()
    meter.free_gib = 1.0
    meter.refuse_above(0.99, "a batch", Recipe())
    with pytest.raises(FinetuneError, match="MEM-001 a batch peaks at"):
        meter.refuse_above(1.01, "a batch", Recipe())


def test_a_meter_sees_what_is_taken_and_given_back_within_it():
    meter = Meter()
    with meter:
        taken = torch.ones(64 << 18)  # 64 MiB
        del taken
        held = torch.ones(32 << 18)
        sum(range(2_000_000))  # longer than the pause between two samples
    assert held.numel() and 0.03 <= meter.gib < 0.5


def test_parts_of_the_batch_come_first_on_a_cpu_only():
    assert parts(4, 2048, whole=False) == [(1, 256), (1, 512), (1, 2048), (4, 2048)]
    assert parts(35, 64, whole=False) == [(1, 8), (1, 16), (2, 64), (8, 64), (35, 64)]
    assert parts(4, 2048, whole=True) == [(1, 256), (4, 2048)]
    assert parts(1, 3, whole=False) == [(1, 1), (1, 3)]


def test_the_longest_row_is_found_and_cut_in_all_its_columns():
    rows = [{"input_ids": list(range(n)), "labels": list(range(n))} for n in (3, 9, 5)]
    dataset = Dataset.from_list(rows).select([2, 1, 0])
    row = longest_row(dataset)
    assert len(row["input_ids"]) == 9
    assert cut(row, 2) == {"input_ids": [7, 8], "labels": [7, 8]}


@pytest.mark.parametrize(
    ("train", "change"),
    [
        (Train(batch_size=3, accumulation=2), "train.batch_size=1 train.accumulation=6"),
        (Train(batch_size=1), "train.gradient_checkpointing=true"),
        (Train(batch_size=1, gradient_checkpointing=True), "data.max_length=512"),
    ],
)
def test_the_change_that_is_told_leaves_the_result_as_it_is_if_one_does(train, change):
    error = too_little("longest batch", "peaks at 9 GiB of 8 GiB", Recipe(train=train, data=Data(max_length=1024)))
    assert error.sentence().endswith(f"Try: {change}")


def test_a_disk_without_room_for_what_is_saved_is_refused(tmp_path, monkeypatch):
    model, run_dir = torch.nn.Linear(1 << 10, 1 << 10), RunDir(tmp_path)
    recipe = Recipe(train=Train(keep_checkpoints=2))
    check_disk(run_dir, model, recipe)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=39 << 20))
    said = r"DSK-003 .*: adapter and training states take 40.0 MiB, free are 39.0 MiB: .* x 40 B, 3 states"
    with pytest.raises(FinetuneError, match=said):
        check_disk(run_dir, model, recipe)
    recipe.train.evaluate_steps = 5  # the best is kept, too
    with pytest.raises(FinetuneError, match=r"take 52\.1 MiB, .* x 52 B, 4 states"):
        check_disk(run_dir, model, recipe)
    for step in ("step-000005", "step-000010", "step-000015"):
        (run_dir.checkpoints / step).mkdir(parents=True)
    check_disk(run_dir, model, recipe)  # of a training that goes on they are there already


def test_a_save_is_written_before_step_one_as_large_as_a_real_one_and_leaves_nothing(rehearsed, monkeypatch):
    written, put = [], checkpoints.put

    def noted(staging, name, data):
        written.append((staging, name, len(data)))
        return put(staging, name, data)

    monkeypatch.setattr(checkpoints, "put", noted)
    done = rehearsed("train.max_steps=1")
    before, real = [
        {n: size for s, n, size in written if s == staging} for staging in dict.fromkeys(w[0] for w in written)
    ]
    assert before.keys() == real.keys() and "optimizer.safetensors" in real
    for name in ("weights.safetensors", "optimizer.safetensors"):
        assert before[name] == pytest.approx(real[name], rel=0.05)
    assert sorted(path.name for path in done.checkpoints.iterdir()) == ["LATEST", "step-000001"]


@pytest.mark.parametrize(
    ("where", "error", "said"),
    [
        ("finetune.checkpoints.put", OSError(errno.ENOSPC, "No space left on device"), "DSK-002 the disk is full"),
        ("finetune.train.trainer._bytes", MemoryError(), "MEM-001 a save needs more than "),
    ],
)
def test_a_save_that_fails_ends_the_run_before_step_one(rehearsed, monkeypatch, capsys, where, error, said):
    run_dir = rehearsed(until="data")
    capsys.readouterr()

    def fails(*_):
        raise error

    monkeypatch.setattr(where, fails)
    assert main(["train", f"run={run_dir.path}"]) == 3
    shown = capsys.readouterr()
    assert shown.err.startswith(said) and "step 1/" not in shown.out
    assert not run_dir.checkpoints.exists() and not run_dir.adapter.exists()


def test_memory_of_a_save_is_foreseen_on_a_cpu(rehearsed, monkeypatch):
    monkeypatch.setattr(Meter, "held_gib", lambda self: 1e6)
    with pytest.raises(FinetuneError, match=r"MEM-001 a save peaks at .* Try: adapter\.rank=8 adapter\.expert_rank=4"):
        rehearsed("train.max_steps=1")


def test_the_optimizer_is_imitated_until_it_has_a_state_of_its_own():
    model = torch.nn.Linear(3, 5)
    model.bias.requires_grad_(False)
    fresh, resumed = (SimpleNamespace(state=s, param_groups=[{"params": [model.weight]}]) for s in ({}, {0: "resumed"}))
    assert [tuple(tensor.shape) for tensor in moments(model, fresh)] == [(5, 3), (5, 3)]
    assert moments(model, resumed) == []


def test_every_set_that_is_evaluated_while_training_is_rehearsed():
    assert evaluation_sets(SimpleNamespace(eval_dataset=None)) == []
    assert evaluation_sets(SimpleNamespace(eval_dataset={"a": 1, "b": 2})) == [1, 2]


def test_memory_left_is_that_of_the_tightest_control_group(tmp_path):
    def group(path: str, limit: str, used: int, files: int, names=("memory.max", "memory.current", "inactive_file")):
        folder = tmp_path / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(limit + "\n")
        (folder / names[1]).write_text(f"{used << 30}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {files << 30}\n")

    of_me = tmp_path / "cgroup"
    of_me.write_text("0::/job/step\n")
    group("job/step", "max", 3, 0)
    group("job", str(10 << 30), 7, 1)
    assert machine._control_group_gib(of_me, tmp_path) == [math.inf, 4.0]
    of_me.write_text("5:cpuset:/x\n3:memory:/job\n")
    old = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    group("memory/job", str(6 << 30), 5, 0, old)
    assert machine._control_group_gib(of_me, tmp_path) == [math.inf, 1.0]
    assert machine._control_group_gib(tmp_path / "none", tmp_path) == [math.inf]
    assert 0 < machine.available_gib() < 1e6
