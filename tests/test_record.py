"""The record of a run, and whether a change to any file is found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from finetune.errors import RunError
from finetune.record import PACKAGES, output_names
from finetune.run import run
from finetune.rundir import RunDir
from finetune.verify import differences, verify
from tests.job import WEIGHTS, Stages, ready


@pytest.fixture
def done(tmp_path: Path) -> RunDir:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    own = {"data__card": "", "data__train_files": [str(rows)], "data__heldout_fraction": 0.5}
    return run(ready(tmp_path, **own), launch=Stages())


def test_the_record_holds_a_hash_of_every_output_but_itself_and_the_logs(done: RunDir) -> None:
    record = json.loads(done.record.read_text())
    files = {p.relative_to(done.path).as_posix() for p in done.path.rglob("*") if p.is_file()}
    assert files - set(record["outputs"]) <= {"run.json", ".lock", "logs/events"}
    assert "logs/events" in files and len(record["outputs"]) == 9
    for name, sha in record["outputs"].items():
        assert hashlib.sha256((done.path / name).read_bytes()).hexdigest() == sha


def test_the_record_holds_a_hash_of_the_base_and_of_the_users_rows(done: RunDir, tmp_path: Path) -> None:
    record = json.loads(done.record.read_text())
    assert set(record["inputs"]) == {
        str(tmp_path / name) for name in ("base/config.json", "base/model.safetensors", "rows.jsonl")
    }
    sha = hashlib.sha256(WEIGHTS).hexdigest()
    assert record["inputs"][str(tmp_path / "base" / "model.safetensors")] == sha


def test_the_record_says_with_what_the_run_was_made(done: RunDir) -> None:
    record = json.loads(done.record.read_text())
    assert record["seed"] == 17 and record["recipe"]["adapter"]["rank"] == 16
    assert set(PACKAGES) == set(record["versions"])
    assert record["licences"]["base"] == "apache-2.0" and record["licences"]["duties"]
    assert record["data"]["splits"]["train"]["rows"] == 10
    assert record["git_commit"] is None or len(record["git_commit"].removesuffix("+changes")) == 40


def test_an_untouched_run_verifies(done: RunDir) -> None:
    assert differences(done) == []
    assert verify(done) == 12


def test_every_changed_byte_is_found_by_the_name_of_its_file(done: RunDir, tmp_path: Path) -> None:
    paths = [*(done.path / name for name in output_names(done)), tmp_path / "base" / "model.safetensors"]
    assert len(paths) == 10
    for path in paths:
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        name = path.relative_to(done.path).as_posix() if path.is_relative_to(done.path) else str(path)
        assert differences(done) == [f"{name} has changed"]
        path.write_bytes(before)
    assert differences(done) == []


def test_missing_and_new_files_are_named_all_at_once(done: RunDir) -> None:
    (done.merged / "model.safetensors").unlink()
    (done.export / "extra.bin").write_bytes(b"?")
    done.report.write_text("other")
    with pytest.raises(RunError) as caught:
        verify(done)
    sentence = caught.value.sentence()
    assert sentence.startswith("VER-001")
    for part in (
        "merged/model.safetensors is missing",
        "export/extra.bin is not in the record",
        "report.html has changed",
    ):
        assert part in sentence


def test_a_new_log_line_is_no_difference(done: RunDir) -> None:
    (done.logs / "events").write_text("more")
    (done.path / "error.log").write_text("?")
    assert differences(done) == []


@pytest.mark.parametrize("text", ["", "[]", '{"inputs": {}}', '{"inputs": {}, "outputs": {"a": 1}}', "{"])
def test_a_damaged_record_is_told(done: RunDir, text: str) -> None:
    done.record.write_text(text)
    with pytest.raises(RunError, match="VER-002"):
        verify(done)


def test_a_run_without_a_record_says_which_stage_writes_it(tmp_path: Path) -> None:
    run_dir = run(ready(tmp_path), until="train", launch=Stages())
    with pytest.raises(RunError, match="RUN-002"):
        verify(run_dir)
