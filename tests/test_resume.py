"""A run that was killed, stopped or damaged goes on as if nothing had happened, or says why it cannot."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from finetune.__main__ import main
from finetune.checkpoints import newest
from finetune.compose import read_recipe
from finetune.data import require_rows
from finetune.errors import RunError
from finetune.launch import handed_on
from finetune.record import hashed_inputs, note_inputs
from finetune.rundir import read_json, sha256_file
from finetune.source import base_folder
from finetune.stop import SIGNALS, asked_to_stop
from finetune.train.trainer import Boundary
from tests.trained import ADAPTER, begun, ended, kill_after, prepared, told, wait_for, with_deepspeed

LORA = ("adapter=lora", "adapter.targets=attention", "adapter.dropout=0.1", "data.packing=true", "train.precision=fp32")
TWICE = ("launch.devices=2", "train.batch_size=1")
CASES = {
    "lora": (LORA, "finetune", 1),
    "qlora": (("train.accumulation=2",), "finetune", 1),
    "ddp": (TWICE, "finetune", 2),
    "full": (("adapter=full", "adapter.embeddings=true", "train.optimizer=adamw_8bit"), "finetune", 1),
    "fsdp2": ((*TWICE, "launch.distribution=fsdp2"), "tests.fsdp_on_cpu", 2),
    "deepspeed": ((*TWICE, "train.accumulation=2", "launch.distribution=deepspeed"), "finetune", 2),
}
STEPS = 40


@pytest.mark.slow
@pytest.mark.parametrize("case", [*list(CASES)[:-1], pytest.param("deepspeed", marks=with_deepspeed)])
def test_forty_steps_killed_and_resumed_are_bit_identical(tmp_path, case, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    words, module, processes = CASES[case]
    words = (*words, f"train.max_steps={STEPS}", "train.save_steps=3")
    straight, killed = prepared(tmp_path, *words), prepared(tmp_path, *words)
    code, said = ended(begun(straight, module, processes, typed=True))  # another hash seed than that of the forks below
    assert code == 0, said
    draw = random.Random()
    step, more = draw.randrange(3, STEPS - 8), draw.random() / 2
    typed = case == "deepspeed"  # nothing is known of it in a fork
    kill_after(begun(killed, module, processes, typed=typed), killed, step, more)
    assert not killed.train.exists(), f"killed too late: after step {step} and {more} s"
    at, batches = newest(killed.checkpoints).checkpoint.step, straight.batches.read_text()
    done = killed.batches.read_text()
    assert len(done.splitlines()) >= at and batches.startswith(done)
    code, said = ended(begun(killed, module, processes, typed=typed))
    assert code == 0, said
    assert f"going on after step {at} of {STEPS}" in said
    assert told(killed) == told(straight)
    assert len(told(killed)) == STEPS
    assert killed.batches.read_text() == batches
    assert [tuple(json.loads(line).values()) for line in batches.splitlines()] == [(s[0], s[-1]) for s in told(killed)]
    file = "model.safetensors" if case == "full" else ADAPTER
    assert (killed.trained / file).read_bytes() == (straight.trained / file).read_bytes()
    a, b = (read_json(run.train) for run in (killed, straight))
    assert a["expert_rows_with_a_gradient"] == b["expert_rows_with_a_gradient"]
    assert a["router"] == b["router"]
    assert [r["after_step"] for r in a["resumed"]] == [at]
    assert b["resumed"] == []


def test_a_signal_saves_and_stops_and_the_same_command_goes_on(tmp_path):
    words = ("train.max_steps=30", "train.save_steps=3")
    straight, stopped = prepared(tmp_path, *words), prepared(tmp_path, *words)
    code, said = ended(begun(straight))
    assert code == 0, said
    process = begun(stopped, typed=True)
    wait_for(process, stopped, 3)
    os.kill(process.pid, signal.SIGTERM)
    code, said = ended(process)
    assert code == 75, said
    assert "TRN-005 stopped by SIGTERM after step " in said
    assert f"the checkpoint is whole. To continue: python -m finetune run={stopped.path}" in said
    assert stopped.requeue.read_text().startswith("SIGTERM after step ")
    assert not stopped.adapter.exists()
    assert "Traceback" not in said
    code, said = ended(begun(stopped))
    assert code == 0, said
    assert not stopped.requeue.exists()
    assert told(stopped) == told(straight)


def test_a_signal_during_the_last_update_ends_the_job_before_the_next_stage(tmp_path, monkeypatch, capsys):
    run_dir = prepared(tmp_path, "train.max_steps=2", "evaluate.min_gain=-1")
    ends = Boundary.on_step_end

    def and_a_signal(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        ends(self, args, state, control, **kwargs)

    monkeypatch.setattr(Boundary, "on_step_end", and_a_signal)
    assert main(["evaluate", f"run={run_dir.path}"]) == 75
    assert "TRN-005 stopped by SIGTERM after step 2 of 2" in capsys.readouterr().err
    assert run_dir.adapter.exists() and run_dir.train.exists() and not run_dir.scores.exists()
    assert run_dir.requeue.exists()
    assert main(["evaluate", f"run={run_dir.path}"]) == 0
    said = capsys.readouterr().out
    assert "train: done before" in said
    assert run_dir.scores.exists() and not run_dir.requeue.exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_is_noted_and_a_second_ctrl_c_does_not_wait(number, capsys):
    before = signal.getsignal(number)
    with asked_to_stop() as request:
        os.kill(os.getpid(), number)
        assert request.signal == signal.Signals(number).name
        assert f"{request.signal}: a checkpoint follows at the end of this update" in capsys.readouterr().err
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        else:
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_of_several_processes_the_first_says_that_a_checkpoint_follows(capsys, monkeypatch):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with asked_to_stop() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.signal == "SIGTERM"
        assert ("a checkpoint follows" in capsys.readouterr().err) == (rank == "0")


@pytest.mark.parametrize("number", SIGNALS)
def test_the_processes_of_a_training_hear_which_signal_came(number):
    wait = "import signal as s; all = {s.SIGINT, s.SIGTERM, s.SIGUSR1}; s.pthread_sigmask(s.SIG_BLOCK, all); "
    wait += "print('ready', flush=True); print(s.Signals(s.sigwait(all)).name)"
    child = subprocess.Popen([sys.executable, "-c", wait], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stdout.readline() == "ready\n"
    with handed_on([child]):
        os.kill(os.getpid(), number)
    assert child.communicate(timeout=60)[0] == f"{signal.Signals(number).name}\n"


def test_two_processes_stop_together_when_one_is_asked(tmp_path):
    run_dir = prepared(tmp_path, *TWICE, "train.max_steps=200", "train.save_steps=2")
    process = begun(run_dir)
    wait_for(process, run_dir, 2)
    ranks = _children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGTERM)
    code, said = ended(process)
    assert code == 75, said
    step = newest(run_dir.checkpoints).checkpoint.step
    assert f"stopped by SIGTERM after step {step} of 200" in said
    assert not any(_alive(pid) for pid in ranks)


def test_processes_of_a_killed_training_do_not_live_on(tmp_path):
    run_dir = prepared(tmp_path, *TWICE, "train.max_steps=400", "train.save_steps=2")
    process = begun(run_dir)
    wait_for(process, run_dir, 2)
    ranks = _children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()  # not for the end of what is printed: that they would hold open
    for _ in range(100):
        if not any(_alive(pid) for pid in ranks):
            break
        signal.sigtimedwait([], 0.05)
    assert not any(_alive(pid) for pid in ranks)


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path):
    run_dir = prepared(tmp_path, "train.max_steps=12", "train.save_steps=2")
    process = begun(run_dir)
    kill_after(process, run_dir, 6)
    step = newest(run_dir.checkpoints).checkpoint.step
    file = run_dir.checkpoints / f"step-{step:06d}" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    code, said = ended(begun(run_dir))
    assert code == 0, said
    assert f"checkpoint passed over: step-{step:06d}: optimizer.safetensors has other bytes than were written" in said
    assert read_json(run_dir.train)["resumed"][0]["after_step"] < step


def test_rows_that_have_changed_are_refused_to_train_or_score_and_prepared_again_by_what_is_told(tmp_path, capsys):
    run_dir = prepared(tmp_path, "train.max_steps=2")
    assert main(["train", f"run={run_dir.path}"]) == 0
    file = run_dir.data / "train.arrow"
    digest = sha256_file(file)
    shutil.rmtree(run_dir.adapter)
    flip(file)
    assert main(["train", f"run={run_dir.path}"]) == 3
    said = capsys.readouterr().err
    assert f"RUN-011 {run_dir.data}: train.arrow is not what the data stage wrote" in said
    assert not run_dir.adapter.exists()
    doomed = re.search(r"Try: rm -rf (\S+) (\S+); python -m finetune run=", said)
    for folder in doomed.groups():
        shutil.rmtree(folder)
    assert main(["train", f"run={run_dir.path}"]) == 0
    assert "going on after step 2 of 2" in capsys.readouterr().out
    assert sha256_file(file) == digest
    flip(run_dir.data / "heldout.arrow")
    assert main(["evaluate", f"run={run_dir.path}"]) == 3
    assert f"RUN-011 {run_dir.data}: heldout.arrow is not what the data stage wrote" in capsys.readouterr().err
    assert not run_dir.scores.exists()


def test_every_file_of_rows_is_looked_at_before_training(tmp_path):
    run_dir = prepared(tmp_path, "data.packing=true")
    recipe = read_recipe(run_dir.recipe)
    require_rows(run_dir, recipe)
    for name in ("heldout.arrow", "packed.arrow", "train.arrow"):
        flip(run_dir.data / name)
        with pytest.raises(RunError, match=rf"RUN-011 {run_dir.data}: {name} is not what"):
            require_rows(run_dir, recipe)
        flip(run_dir.data / name)
    (run_dir.data / "packed.arrow").unlink()
    with pytest.raises(RunError, match=r"RUN-011 .*: packed.arrow is not what"):
        require_rows(run_dir, recipe)


def flip(file):
    """Changes one bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.chmod(0o644)
    file.write_bytes(data)


def test_other_settings_are_refused_by_name_unless_they_are_allowed(tmp_path):
    run_dir = prepared(tmp_path, "train.max_steps=12", "train.save_steps=2")
    kill_after(begun(run_dir), run_dir, 4)
    text = run_dir.recipe.read_text()
    assert text.count("lr: 0.001") == 1
    run_dir.recipe.write_text(text.replace("lr: 0.001", "lr: 0.002"))
    code, said = ended(begun(run_dir))
    assert code == 3
    assert "CKP-002 this run cannot go on as it was begun: settings: train.lr 0.001 is now 0.002" in said
    assert f"python -m finetune run={run_dir.path} train.allow_changed=[settings]" in said
    assert not run_dir.adapter.exists()
    code, said = ended(begun(run_dir, more=["train.allow_changed=[settings]"]))
    assert code == 0, said
    assert "; allowed: settings: train.lr 0.001 is now 0.002" in said
    assert read_json(run_dir.train)["resumed"][0]["changed"] == {"settings": "train.lr 0.001 is now 0.002"}
    assert read_json(run_dir.allowed)[0]["names"] == ["settings"]


def test_a_run_that_goes_on_with_other_bytes_of_the_base_is_recorded_with_these(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(base_folder(read_recipe(prepared(tmp_path).recipe)), base)
    settings = base / "tokenizer_config.json"
    run_dir = prepared(tmp_path, f"model.source={base}", "model.tiny=false", "train.max_steps=8", "train.save_steps=2")
    recipe = read_recipe(run_dir.recipe)
    note_inputs(run_dir, recipe, base)
    kill_after(begun(run_dir), run_dir, 4)
    settings.write_text(settings.read_text() + "\n")
    code, said = ended(begun(run_dir))
    assert code == 3, said
    assert "base: other bytes than when training began in tokenizer_config.json" in said
    with pytest.raises(RunError, match="REC-001"):
        hashed_inputs(run_dir, recipe, base)
    code, said = ended(begun(run_dir, more=["train.allow_changed=[base]"]))
    assert code == 0, said
    assert "tokenizer_config.json" in read_json(run_dir.train)["resumed"][0]["changed"]["base"]
    assert hashed_inputs(run_dir, recipe, base)[str(settings)] == sha256_file(settings)


def test_a_run_goes_on_with_two_processes_and_another_learning_rate_as_it_is_told(tmp_path):
    run_dir = prepared(tmp_path, "train.max_steps=12", "train.save_steps=2")
    kill_after(begun(run_dir), run_dir, 4)
    changed = ["launch.devices=2", "train.lr=0.002"]
    code, said = ended(begun(run_dir, more=changed))
    assert code == 2 and read_recipe(run_dir.recipe).launch.devices == 1
    told = re.search(r"Type: python -m finetune train run=\S+ (.*), or", said)[1].split()
    assert told == [*changed, "train.allow_changed=[world_size,settings]"]
    code, said = ended(begun(run_dir, more=told))
    assert code == 0, said
    trained = read_json(run_dir.train)
    changes = {"world_size": "1 is now 2", "settings": "train.lr 0.001 is now 0.002"}
    assert (trained["processes"], trained["resumed"][0]["changed"]) == (2, changes)


def test_weights_of_the_saved_adapter_are_those_of_the_last_checkpoint(tmp_path):
    run_dir = prepared(tmp_path, "train.max_steps=4", "train.save_steps=2")
    code, said = ended(begun(run_dir))
    assert code == 0, said
    saved = load_file(run_dir.checkpoints / "step-000004" / "weights.safetensors")
    adapter = load_file(run_dir.adapter / ADAPTER)
    assert {name.replace(".default", "") for name in saved} == set(adapter)
    assert all((adapter[name.replace(".default", "")] == tensor).all() for name, tensor in saved.items())


def _children(pid):
    return [int(p) for p in open(f"/proc/{pid}/task/{pid}/children").read().split()]  # noqa: PTH123


def _alive(pid):
    try:
        with open(f"/proc/{pid}/status") as file:  # noqa: PTH123
            return not any(line.startswith("State:\tZ") for line in file)
    except FileNotFoundError:
        return False
