"""Several processes of one training: what they compute together, what each holds, and how one's failure ends all."""

import ast
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from accelerate import DistributedType
from safetensors.torch import load_file

from finetune import machine
from finetune.check import problems
from finetune.errors import RunError
from finetune.launch import free_port, together
from finetune.ranks import Ranks
from finetune.rundir import read_json
from finetune.train.distribute import require_ranks
from tests.job import good
from tests.trained import ADAPTER, begun, ended, prepared, told, with_deepspeed
from tests.warm import Forked

SAME = ("train.precision=fp32", "train.max_steps=6", "train.save_steps=6")
TWO = ("launch.devices=2", "train.batch_size=2")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run_dir = prepared(tmp_path_factory.mktemp("alone"), *SAME, "train.batch_size=4")
    code, said = ended(begun(run_dir))
    assert code == 0, said
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("distribution", "module"),
    [
        ("ddp", "finetune"),
        ("fsdp2", "tests.fsdp_on_cpu"),
        pytest.param("deepspeed", "finetune", marks=with_deepspeed),
    ],
)
def test_two_processes_with_the_same_rows_learn_what_one_does(tmp_path, alone, distribution, module, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    run_dir = prepared(tmp_path, *SAME, *TWO, f"launch.distribution={distribution}")
    code, said = ended(begun(run_dir, module, 2, typed=distribution == "deepspeed"))
    assert code == 0, said
    assert "2 devices x 2 rows x 1 accumulated = 4 rows per update" in said
    learnt_the_same(run_dir, alone)
    written = read_json(run_dir.train)
    assert (written["processes"], written["distribution"]) == (2, distribution)
    whole = read_json(alone.train)
    assert written["expert_rows_with_a_gradient"] == whole["expert_rows_with_a_gradient"]
    if distribution == "deepspeed":
        assert written["optimizer_gib"] == pytest.approx(whole["optimizer_gib"] / 2, rel=0.01)


def learnt_the_same(run_dir, alone):
    for a, b in zip(told(run_dir), told(alone), strict=True):
        assert a[1] == pytest.approx(b[1], abs=1e-6)
        assert a[2] == pytest.approx(b[2], abs=1e-5)
    one, two = (load_file(r.adapter / ADAPTER) for r in (alone, run_dir))
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5


DENSE = ("model.family=qwen3", "model.source=", "adapter.targets=all")


@pytest.mark.slow
def test_two_halves_of_a_dense_family_that_recompute_learn_what_one_process_does(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    words = (*SAME, *DENSE, "train.max_steps=4", "adapter.double_quantisation=true")
    alone = prepared(tmp_path, *words, "train.batch_size=4", recipe="qwen3_30b_legal")
    recomputed = (*TWO, "launch.distribution=fsdp2", "train.gradient_checkpointing=true", "train.checkpointed_layers=1")
    halves = prepared(tmp_path, *words, *recomputed, recipe="qwen3_30b_legal")
    for run_dir, of in ((alone, ("finetune", 1)), (halves, ("tests.fsdp_on_cpu", 2))):
        code, said = ended(begun(run_dir, *of))
        assert code == 0, said
    assert "recomputing activations in 1 of 2 layers" in said
    learnt_the_same(halves, alone)


@pytest.mark.parametrize("words", [(), DENSE, (*DENSE, "adapter.double_quantisation=true")])
def test_fsdp2_gives_each_process_half_of_the_4_bit_weights(tmp_path, words, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    run_dir = prepared(tmp_path, *SAME, *TWO, "launch.distribution=fsdp2", *words, recipe="qwen3_30b_legal")
    out = tmp_path / "bytes"
    code, said = ended(Forked("tests.trained", ["tests.fsdp_bytes", "2", str(run_dir.path), str(out)]))
    assert code == 0, said
    for rank in (0, 1):
        held = json.loads((out.parent / f"bytes-{rank}").read_text())
        assert held["whole"] > 0
        assert held["mine"] / held["whole"] <= 0.505, held
        assert held["experts_mine"] == held["experts_whole"] / 2
        assert bool(held["experts_whole"]) != (words != ())


def test_a_failure_of_one_process_ends_all_with_what_it_says(tmp_path):
    run_dir = prepared(tmp_path, *SAME, *TWO)
    code = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)"
    with pytest.raises(RunError, match="LCH-006 process 1 of 2 ended with exit code 3"), _patience(1.0):
        together([sys.executable, "-c", code], 2)
    (run_dir.data / "train.arrow").unlink()
    code, said = ended(begun(run_dir))
    assert code == 3
    assert "LCH-006 process " in said
    assert "Traceback" not in said


def _patience(seconds):
    from unittest.mock import patch

    return patch("finetune.launch.PATIENCE_SECONDS", seconds)


def test_processes_tell_each_other_of_a_failure_and_share_values(tmp_path):
    code = """
import os, json, torch.distributed as dist
from finetune.errors import DataError
from finetune.ranks import Ranks
dist.init_process_group('gloo')
ranks = Ranks.here()
assert ranks.gather({'rank': ranks.rank, 'text': 'x' * ranks.rank}) == [
    {'rank': 0, 'text': ''}, {'rank': 1, 'text': 'x'}]
assert ranks.share('from ' + str(ranks.rank)) == 'from 0'
ranks.agree()
said = ''
try:
    ranks.agree(DataError('DAT-9', 'bad rows', 'why', 'fix') if ranks.rank else None)
except Exception as error:
    said = type(error).__name__ + ' ' + str(error)
open(os.environ['OUT'] + str(ranks.rank), 'w').write(said)
dist.destroy_process_group()
"""
    os.environ["OUT"] = str(tmp_path / "said-")
    together([sys.executable, "-c", code], 2, 1)
    assert (tmp_path / "said-0").read_text() == "RunError DAT-9 bad rows: why. Try: fix"
    assert (tmp_path / "said-1").read_text() == "DataError DAT-9 bad rows: why. Try: fix"


def test_what_one_process_does_before_the_others_is_done_once_and_its_failure_is_that_of_all(tmp_path):
    code = """
import os, pathlib, torch.distributed as dist
from finetune.ranks import Ranks
dist.init_process_group('gloo')
ranks, said, made = Ranks.here(), [], pathlib.Path(os.environ['OUT'] + 'made')
def work(fails):
    if ranks.rank in fails:
        raise OSError(f'{ranks.rank} fails')
    said.append(made.exists())
    made.touch()
    return ranks.rank
assert ranks.in_turn(lambda: work([])) == ranks.rank
for fails in ([0], [1]):
    try:
        ranks.in_turn(lambda: work(fails))
    except Exception as error:
        said.append(str(error))
open(os.environ['OUT'] + str(ranks.rank), 'w').write(repr(said))
dist.destroy_process_group()
"""
    os.environ["OUT"] = str(tmp_path / "said-")
    together([sys.executable, "-c", code], 2, 1)
    first, second = (ast.literal_eval((tmp_path / f"said-{rank}").read_text()) for rank in (0, 1))
    assert first == [False, "0 fails", True, "RNK-001 another process failed with OSError: 1 fails."]
    assert second == [True, "RNK-001 another process failed with OSError: 0 fails.", "1 fails"]


def test_a_base_that_is_gone_is_made_once_by_processes_that_another_launcher_started(tmp_path):
    """As Slurm does: nobody has looked for the base before there are several processes."""
    run_dir = prepared(tmp_path, *SAME, *TWO, "train.max_steps=1")
    shutil.rmtree(tmp_path / "cache" / "bases")
    code, said = ended(begun(run_dir, "finetune.worker", 2))
    assert code == 0, said
    assert said.count("Making the base") == 1


def test_one_process_where_two_were_planned_is_refused(tmp_path):
    run_dir = prepared(tmp_path, *SAME, *TWO)
    code, said = ended(Forked("finetune.worker", ["train", str(run_dir.path)]))
    assert code == 3
    assert "LCH-004 1 processes were started, launch.nodes x launch.devices is 2" in said


def test_processes_that_accelerate_does_not_distribute_are_refused(tmp_path):
    """FSDP2 on a CPU is silently DDP in accelerate 1.15.0."""
    environment = {"ACCELERATE_TORCH_DEVICE": "cpu"}
    os.environ.update(environment)
    try:
        run_dir = prepared(tmp_path, *SAME, *TWO, "launch.distribution=fsdp2")
        code, said = ended(begun(run_dir, "finetune.worker", 2))
    finally:
        os.environ.pop("ACCELERATE_TORCH_DEVICE")
    assert code != 0
    assert "LCH-005 2 processes were to train together" in said
    assert not run_dir.adapter.exists()


KINDS = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}


@pytest.mark.parametrize("distribution", KINDS)
def test_three_numbers_and_the_kind_must_say_that_all_train_together(distribution, monkeypatch):
    """Whatever a launcher leaves: one training twice, one process where there were two, another kind than asked for."""
    recipe = good(launch__devices=2, launch__distribution=distribution)
    right = (2, 2, 2, KINDS[distribution])
    for seen in [right, (1, *right[1:]), (2, 1, 2, right[3]), (2, 2, 1, right[3]), (2, 1, 1, "NO"), (2, 2, 2, "NO")] + [
        (2, 2, 2, kind) for other, kind in KINDS.items() if other != distribution
    ]:
        environment, trainer, accelerator, kind = seen
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(environment))
        told = SimpleNamespace(num_processes=accelerator, distributed_type=DistributedType[kind])
        given = SimpleNamespace(args=SimpleNamespace(world_size=trainer), accelerator=told)
        with nullcontext() if seen == right else pytest.raises(RunError, match="LCH-005 2 processes were to train"):
            require_ranks(given, recipe, Ranks(0, 2))


def test_a_second_process_on_the_same_run_is_refused(tmp_path):
    run_dir = prepared(tmp_path, *SAME)
    with run_dir.lock():
        code, said = ended(begun(run_dir))
    assert code == 3
    assert "RUN-003" in said


def test_what_does_not_fit_this_machine_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    assert machine.launch_problems(good(launch__devices=2)) == []
    sentence = machine.launch_problems(good(launch__devices=2, launch__distribution="fsdp2"))[0]
    assert sentence.startswith("LCH-007 launch.distribution=fsdp2 needs NVIDIA GPUs")
    monkeypatch.setattr(machine, "gpu_count", lambda: 4)
    assert machine.launch_problems(good(launch__devices=8))[0].startswith("LCH-008 launch.devices=8 is more than the 4")
    assert any(p.startswith("LCH-009 launch.nodes=2") for p in problems(good(launch__nodes=2)))


def test_processes_are_started_from_another_thread_too(tmp_path):
    """As a notebook may do; signals can be handled in the main thread only."""
    code = "import os, pathlib; pathlib.Path(os.environ['OUT'] + os.environ['RANK']).touch()"
    os.environ["OUT"] = str(tmp_path / "rank-")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(together, [sys.executable, "-c", code], 2).result()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-0", "rank-1"]


def test_a_port_is_free():
    assert 1024 < free_port() < 65536
