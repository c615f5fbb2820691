"""Checkpoints: whatever happens to a save, at whichever file operation, the last whole one is found and used."""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest

from finetune import checkpoints
from finetune.checkpoints import faults, latest, newest, publish, put, retain, stage
from finetune.errors import RunError
from finetune.rundir import RunDir

FILES = {"weights.safetensors": bytes(range(256)) * 8, "memory.json": b'{"a": 1}\n', "rank-0000.safetensors": b"r" * 99}
OPERATIONS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def save(root, step, about=None, files=FILES):
    staging = stage(root, step, 1000)
    entries = [put(staging, name, data) for name, data in files.items()]
    path = publish(staging, step, entries, about or {"seed": 1})
    retain(root, 1)
    return path


class Disk:
    """Counts the file operations of this process and calls `then` at the one of that number, before it happens."""

    def __init__(self, monkeypatch, at=0, then=None):
        self.count = 0
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name), at, then))

    def _counted(self, real, at, then):
        def operation(*args, **kwargs):
            self.count += 1
            if self.count == at:
                then()
            return real(*args, **kwargs)

        return operation


def test_a_checkpoint_is_found_with_what_was_said_about_it(tmp_path):
    path = save(tmp_path, 120, {"seed": 7})
    found = newest(tmp_path)
    assert found.checkpoint.path == path == tmp_path / "step-000120"
    assert (found.checkpoint.step, found.checkpoint.about, found.passed_over) == (120, {"seed": 7}, [])
    assert {name: (path / name).read_bytes() for name in FILES} == FILES
    assert latest(tmp_path) == "step-000120"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def operations_of_a_save(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path / "count"
        save(root, 1)
        disk = Disk(patch)
        save(root, 2)
    return disk.count


def test_a_full_disk_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    total = operations_of_a_save(tmp_path)
    assert total > 20
    steps, failed = set(), 0
    for k in range(1, total + 1):
        root = tmp_path / f"full-{k}"
        save(root, 1)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, k, full)
            try:
                save(root, 2)
            except OSError as error:
                assert error.errno == errno.ENOSPC  # one operation, making a folder that is there, may fail
                failed += 1
        steps.add(_whole(root))
    assert steps == {1, 2}
    assert failed >= total - 1


def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path):
    total = operations_of_a_save(tmp_path)
    steps = set()
    for k in range(1, total + 1):
        root = tmp_path / f"kill-{k}"
        save(root, 1)
        child = os.fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                Disk(patch, k, lambda: os._exit(9))
                save(root, 2)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        steps.add(_whole(root))
    assert steps == {1, 2}


def _whole(root):
    """The step that resuming would take, after making sure that it is whole and that the next save works."""
    found = newest(root)
    assert found.checkpoint is not None
    assert found.passed_over == []
    assert {name: (found.checkpoint.path / name).read_bytes() for name in FILES} == FILES
    RunDir(root.parent).sweep()
    left = [p for p in root.iterdir() if p.name.startswith(".partial-")]
    assert left == []
    save(root, 3)
    assert newest(root).checkpoint.step == 3
    assert latest(root) == "step-000003"
    return found.checkpoint.step


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone", "grown", "link"])
def test_a_damaged_file_is_named_and_the_one_before_is_used(tmp_path, name, how):
    save(tmp_path, 1)
    publish_again = stage(tmp_path, 2, 0)
    publish(publish_again, 2, [put(publish_again, n, d) for n, d in FILES.items()], {})
    file = tmp_path / "step-000002" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "flip":
        file.write_bytes(data)
    elif how == "cut":
        file.write_bytes(data[:-1])
    elif how == "grown":
        file.write_bytes(bytes(data) + b" x")
    else:
        file.unlink()
    if how == "link":
        file.symlink_to(tmp_path / "step-000001" / name)
    found = newest(tmp_path)
    assert found.checkpoint.step == 1
    assert len(found.passed_over) == 1
    assert found.passed_over[0].startswith(f"step-000002: {name} ")


def test_a_manifest_of_another_step_is_no_manifest(tmp_path):
    save(tmp_path, 4)
    shutil.copytree(tmp_path / "step-000004", tmp_path / "step-000009")
    found = newest(tmp_path)
    assert found.checkpoint.step == 4
    assert found.passed_over == ["step-000009: manifest.json is that of step 4"]


def test_bytes_that_the_disk_gives_back_otherwise_are_not_published(tmp_path, monkeypatch):
    save(tmp_path, 1)
    staging = stage(tmp_path, 2, 0)
    entries = [put(staging, name, data) for name, data in FILES.items()]
    (staging / "memory.json").write_bytes(b'{"a": 2}\n')
    with pytest.raises(RunError, match=r"CKP-001 .*memory\.json has other bytes"):
        publish(staging, 2, entries, {})
    assert newest(tmp_path).checkpoint.step == 1
    assert not staging.exists()


def test_the_newest_are_kept_and_the_best_and_the_one_latest_names(tmp_path):
    for step in (1, 2, 3, 4, 5):
        staging = stage(tmp_path, step, 0)
        publish(staging, step, [put(staging, n, d) for n, d in FILES.items()], {})
    (tmp_path / "LATEST").write_text("step-000001\n")
    retain(tmp_path, 2, spare=[2])
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [f"step-00000{n}" for n in (1, 2, 4, 5)]


def test_damaged_ones_take_no_place_of_whole_ones(tmp_path):
    for step in (33, 36):
        staging = stage(tmp_path, step, 0)
        publish(staging, step, [put(staging, n, d) for n, d in FILES.items()], {})
    (tmp_path / "step-000036" / "memory.json").unlink()
    damaged = newest(tmp_path).damaged
    assert damaged == {36}
    for step, left in ((34, {33, 34, 36}), (35, {34, 35, 36}), (37, {35, 37})):
        staging = stage(tmp_path, step, 0)
        publish(staging, step, [put(staging, n, d) for n, d in FILES.items()], {})
        retain(tmp_path, 2, damaged=damaged)
        assert {int(p.name[5:]) for p in tmp_path.glob("step-*")} == left


def test_a_save_that_does_not_fit_is_refused_before_it_begins(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = SimpleNamespace(total=2**40, used=0, free=checkpoints.SPARE_BYTES + 999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunError, match=r"DSK-003 .*does not fit.* Try: freeing some room"):
        stage(tmp_path, 2, 1000)
    assert faults(tmp_path / "step-000001", 1) == []


def test_a_step_that_is_there_already_stays_as_it_is(tmp_path):
    path = save(tmp_path, 1)
    before = (path / "manifest.json").stat().st_ino
    assert save(tmp_path, 1) == path
    assert (path / "manifest.json").stat().st_ino == before
    (path / "memory.json").write_bytes(b"damaged")
    assert save(tmp_path, 1) == path
    assert faults(path, 1) == []


def test_nothing_is_found_where_nothing_is(tmp_path):
    assert newest(tmp_path / "none") == checkpoints.Found()
    (tmp_path / "step-1").mkdir()
    (tmp_path / "notes").mkdir()
    assert newest(tmp_path).checkpoint is None
