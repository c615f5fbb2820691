"""A merge that is killed anywhere goes on where it was, and ends with the bytes of one that nobody disturbed."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from finetune.errors import RunError, WeightsError
from finetune.merge import merge_folder
from finetune.merge import shard as shard_module
from finetune.merge.plan import How
from finetune.recipe import Adapter
from finetune.rundir import RESUMED, read_json, sha256_tree
from tests.tiny_models import adapted, checkpoint

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(base, adapter, hashes of the whole merge)."""
    folder = tmp_path_factory.mktemp("staging")
    _, model = adapted("mixtral", Adapter(targets="all", rank=4, expert_rank=3))
    model.save_pretrained(folder / "adapter")
    merge_folder(checkpoint("mixtral", True), folder / "adapter", folder / "merged")
    return checkpoint("mixtral", True), folder / "adapter", sha256_tree(folder / "merged")


class Heard(Console):
    """A console that keeps what is said."""

    def __init__(self):
        super().__init__(quiet=True)
        self.said = []

    def print(self, *words, **_):
        self.said.append(" ".join(map(str, words)))


def test_killed_twice_at_any_write_it_goes_on_and_ends_with_the_same_bytes(job, tmp_path):
    """At six of the 88 times that a merge of five files writes, sizes, renames or syncs one."""
    base, adapter, whole = job
    points = [str(point) for point in range(2, 80, 15)]
    command = [sys.executable, "-m", "tests.merge_killed", str(base), str(adapter), str(tmp_path), *points]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(points)
    assert all(finished == sorted(finished) for finished, _ in lines)
    assert len({finished[0] for finished, _ in lines}) >= 3 and any(len(finished) == 2 for finished, _ in lines)
    assert all(left == whole for _, left in lines)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def stopped(job, tmp_path, monkeypatch):
    """(target, staging folder) of a merge that ran out of disk when two of its files were finished."""
    base, adapter, _ = job
    real, begun = shard_module.write_at, []
    folder = tmp_path / (RESUMED + "merged")

    def finished():
        return len(read_json(folder / ".progress.json")["files"])

    def full(file, data, offset):
        if offset == 0:
            begun.append(file)
            if len(begun) > 2:  # files are written side by side: the first two may not be whole yet
                deadline = time.monotonic() + 60
                while finished() < 2 and time.monotonic() < deadline:
                    time.sleep(0.01)
                raise OSError(28, "No space left on device")
        real(file, data, offset)

    monkeypatch.setattr(shard_module, "write_at", full)
    with pytest.raises(OSError, match="No space"):
        merge_folder(base, adapter, tmp_path / "merged")
    monkeypatch.undo()
    assert finished() == 2
    assert not (tmp_path / "merged").exists()
    return tmp_path / "merged", folder


def test_a_full_disk_keeps_what_is_finished_and_a_damaged_file_of_it_is_written_again(job, stopped):
    base, adapter, whole = job
    target, folder = stopped
    first, second = sorted(folder.glob("model-*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-5] ^= 1
    first.write_bytes(data)
    kept = second.stat().st_mtime_ns
    heard = Heard()
    merge_folder(base, adapter, target, heard)
    assert any(sentence.startswith(f"{first.name} is not what it was") for sentence in heard.said)
    assert any("1 of" in sentence for sentence in heard.said if sentence.startswith("going on"))
    assert (target / second.name).stat().st_mtime_ns == kept  # not written again
    assert sha256_tree(target) == whole


@pytest.mark.parametrize("other", ["adapter", "base", "setting"])
def test_a_changed_input_begins_anew(other, job, stopped, tmp_path):
    base, adapter, _ = job
    target, folder = stopped
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("model-*.safetensors")}
    how = How(quantised="bf16")
    if other == "adapter":
        shutil.copytree(adapter, tmp_path / "adapter")
        adapter = tmp_path / "adapter"
        values = load_file(adapter / "adapter_model.safetensors")
        save_file({k: v * 2 for k, v in values.items()}, adapter / "adapter_model.safetensors", {"format": "pt"})
    elif other == "base":
        shutil.copytree(base, tmp_path / "base")
        base = tmp_path / "base"
    else:
        from finetune.merge.four_bit import FourBit

        how = How(four_bit=FourBit("fp32", False))
    heard = Heard()
    merge_folder(base, adapter, target, heard, how)
    assert not any(sentence.startswith("going on") for sentence in heard.said)
    assert finished and all((target / name).stat().st_mtime_ns != time for name, time in finished.items())
    expected = tmp_path / "expected"
    merge_folder(base, adapter, expected, how=how)
    assert sha256_tree(target) == sha256_tree(expected)


def test_two_processes_do_not_merge_into_one_folder(job, stopped):
    base, adapter, _ = job
    target, folder = stopped
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(RunError, match="RUN-003"):
        merge_folder(base, adapter, target)
    os.close(handle)
    merge_folder(base, adapter, target)


def test_too_little_room_is_said_before_anything_is_written(job, tmp_path, monkeypatch):
    base, adapter, _ = job
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=1000))
    with pytest.raises(RunError, match="DSK-002 merging needs"):
        merge_folder(base, adapter, tmp_path / "merged")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_cannot_be_merged_leaves_nothing_behind(job, tmp_path):
    _, adapter, _ = job
    with pytest.raises(WeightsError):
        merge_folder(checkpoint("llama", True), adapter, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
