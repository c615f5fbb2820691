"""The record of a run, and whether a change to any file, number or event is found."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from finetune import record, sealed
from finetune.errors import RunError
from finetune.record import PACKAGES, content, output_names, schema_problems
from finetune.run import carry_on, run
from finetune.rundir import RunDir, read_json, write_json
from finetune.verify import as_json, differences, verify
from tests.job import PARITY, WEIGHTS, Stages, ready


@pytest.fixture
def done(tmp_path: Path) -> RunDir:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    own = {"data__card": "", "data__train_files": [str(rows)], "data__heldout_fraction": 0.5}
    return run(ready(tmp_path, **own), launch=Stages())


def forged(done: RunDir, *keys: str, value: Any) -> list[str]:
    """What is found after one value of run.json was overwritten."""
    told = read_json(done.record)
    target = told
    for key in keys[:-1]:
        target = target[key]
    assert target[keys[-1]] != value
    target[keys[-1]] = value
    write_json(done.record, told)
    return differences(done)


def test_the_record_holds_a_hash_of_every_output_but_itself_the_events_and_the_logs(done: RunDir) -> None:
    told = json.loads(done.record.read_text())
    files = {p.relative_to(done.path).as_posix() for p in done.path.rglob("*") if p.is_file()}
    assert files - set(told["outputs"]) <= {"run.json", ".lock", "logs/events", "events.jsonl"}
    assert "logs/events" in files and len(told["outputs"]) == 13
    for name, sha in told["outputs"].items():
        assert hashlib.sha256((done.path / name).read_bytes()).hexdigest() == sha


def test_the_record_holds_a_hash_of_the_base_and_of_the_users_rows(done: RunDir, tmp_path: Path) -> None:
    told = json.loads(done.record.read_text())
    assert set(told["inputs"]) == {
        str(tmp_path / name) for name in ("base/config.json", "base/model.safetensors", "rows.jsonl")
    }
    sha = hashlib.sha256(WEIGHTS).hexdigest()
    assert told["inputs"][str(tmp_path / "base" / "model.safetensors")] == sha


def test_the_record_says_with_what_the_run_was_made(done: RunDir) -> None:
    told = json.loads(done.record.read_text())
    assert told["seed"] == 17 and told["recipe"]["adapter"]["rank"] == 16
    assert set(PACKAGES) == set(told["versions"]) and told["packages"]["torch"] == told["versions"]["torch"]
    assert told["licences"]["base"] == "apache-2.0" and told["licences"]["duties"]
    assert told["git_commit"] is None or len(told["git_commit"].removesuffix("+changes")) == 40
    lock = Path(record.__file__).parents[1] / "requirements.lock"
    assert told["lock"]["sha256"] == hashlib.sha256(lock.read_bytes()).hexdigest()


def test_the_record_says_how_many_rows_came_in_and_why_some_were_dropped(done: RunDir) -> None:
    rows = json.loads(done.record.read_text())["rows"]
    assert rows == {"read": 12, "kept": 11, "dropped": {"copy": 1}, "splits": {"train": 10, "heldout": 1}}


def test_every_stage_that_began_and_ended_is_an_event(done: RunDir) -> None:
    events = [json.loads(line) for line in done.events.read_text().splitlines()]
    stages = ("data", "train", "evaluate", "merge", "export", "report")
    assert [(e["what"], e["stage"]) for e in events] == [(w, s) for s in stages for w in ("started", "finished")]
    assert json.loads(done.record.read_text())["events"]["count"] == 12


def test_the_record_is_of_the_published_form_and_every_part_of_that_form_is_described(done: RunDir) -> None:
    told = read_json(done.record)
    assert schema_problems(told) == []
    schema = json.loads((Path(record.__file__).parent / "schemas" / "run.schema.json").read_text())
    assert set(schema["required"]) == set(schema["properties"]) == set(told)
    bare = [
        key
        for part in (schema, *(p for p in schema["properties"].values() if "properties" in p))
        for key, value in part["properties"].items()
        if "description" not in value and "$ref" not in value and "anyOf" not in value
    ]
    assert bare == []


@pytest.mark.parametrize(
    ("keys", "value", "where"),
    [
        (("outputs", "recipe.yaml"), "abc", "outputs.recipe.yaml"),
        (("energy", "kwh"), -1, "energy.kwh"),
        (("events", "count"), "12", "events.count"),
        (("git_commit",), "main", "git_commit"),
        (("rows", "kept"), None, "rows.kept"),
    ],
)
def test_a_record_of_another_form_is_told_where(done: RunDir, keys: tuple[str, ...], value: Any, where: str) -> None:
    assert any(phrase.startswith(f"run.json: {where}: ") for phrase in forged(done, *keys, value=value))


def test_an_untouched_run_verifies(done: RunDir) -> None:
    assert differences(done) == []
    assert verify(done) == 16


def test_every_changed_byte_is_found_by_the_name_of_its_file(done: RunDir, tmp_path: Path) -> None:
    paths = [*(done.path / name for name in output_names(done)), tmp_path / "base" / "model.safetensors"]
    rooms = {path.parent.name for path in paths}
    assert len(paths) == 14 and done.scores_rows in paths and {"adapter", "merged", "export", "data"} <= rooms
    for path in paths:
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        name = path.relative_to(done.path).as_posix() if path.is_relative_to(done.path) else str(path)
        assert differences(done) == [f"{name} has changed"]
        path.write_bytes(before)
    assert differences(done) == []


@pytest.mark.parametrize(
    ("keys", "value", "part"),
    [
        (("rows", "dropped"), {}, "rows"),
        (("metrics", "tuned", "loss"), 0.5, "metrics"),
        (("compute", "by_parameters", "flop"), 1.0, "compute"),
        (("training", "tokens"), 5, "training"),
        (("recipe", "seed"), 18, "recipe"),
        (("licences", "said", "use"), "research", "licences"),
        (("base", "title"), "Another", "base"),
        (("energy", "kwh"), 0.0, "energy"),
    ],
)
def test_a_number_of_the_record_that_its_files_contradict_is_named(
    done: RunDir, keys: tuple[str, ...], value: Any, part: str
) -> None:
    assert forged(done, *keys, value=value) == [f"run.json: {part} is not what the files of the run say"]


def test_a_record_from_before_there_was_a_setting_verifies_as_long_as_nobody_has_set_it(done: RunDir) -> None:
    read = read_json(done.record)
    assert read["recipe"]["export"]["croissant"] is False and read["recipe"]["data"]["heldout_fraction"] == 0.5
    for section, name in (("export", "croissant"), ("launch", "context_parallel")):
        del read["recipe"][section][name]
    write_json(done.record, read)
    assert differences(done) == []
    del read["recipe"]["data"]["heldout_fraction"]  # set by the recipe: without it the record says another job
    write_json(done.record, read)
    assert differences(done) == ["run.json: recipe is not what the files of the run say"]


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
    (done.path / ".partial-export-1").mkdir()
    (done.path / ".partial-export-1" / "half").write_text("?")
    assert differences(done) == []


@pytest.mark.parametrize("name", ["export/hf/x.log", "export/.partial-x", "merged/.partial-y/z", "data/.partial-w"])
def test_a_new_file_below_the_top_is_found_whatever_it_is_called(done: RunDir, name: str) -> None:
    (done.path / name).parent.mkdir(exist_ok=True)
    (done.path / name).write_text("?")
    assert differences(done) == [f"{name} is not in the record"]


def test_what_another_version_wrote_is_not_derived_again_and_that_is_said(done: RunDir, capsys: Any) -> None:
    assert as_json(done)["not_checked"] == []
    write_json(done.record, read_json(done.record) | {"finetune": "0.0.1", "seed": 18})
    told = as_json(done)
    assert told["verified"] and len(told["not_checked"]) == 1
    said: list[str] = []
    assert verify(done, say=said.append) == told["files"]
    assert said == [f"not checked: {told['not_checked'][0]}"]
    assert "finetune 0.0.1 wrote it, this is" in said[0] and "pip install finetune==0.0.1" in said[0]
    verify(done)
    assert capsys.readouterr().out.splitlines()[-1] == said[0]


# --- between the proof and the record ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["merged/model.safetensors", "merged/parity.json", "adapter/adapter_model.safetensors"]
)
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_byte_that_changes_after_the_proof_gets_no_record(tmp_path: Path, name: str, how: str) -> None:
    run_dir = run(ready(tmp_path), until="merge", launch=Stages())
    before = (run_dir.path / name).read_bytes()
    (run_dir.path / name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    if how == "gone":
        (run_dir.path / name).unlink()
    what = {"changed": "has changed", "gone": "is missing"}[how]
    with pytest.raises(RunError, match=rf"MRG-015 not what the merge has proved: {name} {what}") as caught:
        carry_on(run_dir, launch=Stages())
    assert f"python -m finetune report run={run_dir.path}" in caught.value.fix
    assert ("a new run" in caught.value.fix) == name.startswith("adapter/")
    assert not run_dir.record.exists()
    (run_dir.path / name).write_bytes(before)
    assert differences(carry_on(run_dir, launch=Stages())) == []


def test_a_file_that_came_after_the_proof_and_a_copy_that_is_none_get_no_record(tmp_path: Path) -> None:
    run_dir = run(ready(tmp_path), until="export", launch=Stages())
    (run_dir.merged / "pytorch_model.bin").write_bytes(b"?")
    with pytest.raises(RunError, match=r"MRG-015 .*: merged/pytorch_model.bin was not there"):
        carry_on(run_dir, launch=Stages())
    (run_dir.merged / "pytorch_model.bin").unlink()
    for folder, name in (("hf", "model.safetensors"), ("peft", "adapter_model.safetensors")):
        (run_dir.export / folder).mkdir()
        (run_dir.export / folder / name).write_bytes(b"?")
        with pytest.raises(RunError, match=rf"MRG-015 .*: export/{folder}/{name} has changed"):
            carry_on(run_dir, launch=Stages())
        (run_dir.export / folder / name).unlink()
    assert differences(carry_on(run_dir, launch=Stages())) == []


def test_a_merge_of_before_these_hashes_is_compared_by_those_of_its_weights(tmp_path: Path) -> None:
    run_dir = run(ready(tmp_path), until="merge", launch=Stages())
    note = run_dir.merged / "merge.json"
    weights = {"model.safetensors": read_json(note)["sha256"]["model.safetensors"]}
    write_json(note, {"schema": 1, "sha256": weights})
    (run_dir.merged / "notes.txt").write_text("?")
    sealed.refuse(run_dir)
    (run_dir.merged / "model.safetensors").write_bytes(b"?")
    with pytest.raises(RunError, match=r"MRG-015 .*: merged/model.safetensors has changed"):
        sealed.refuse(run_dir)


@pytest.mark.parametrize("text", ["", "[]", '{"inputs": {}}', '{"inputs": {}, "outputs": {"a": 1}}', "{"])
def test_a_damaged_record_is_told(done: RunDir, text: str) -> None:
    done.record.write_text(text)
    with pytest.raises(RunError, match="VER-002"):
        verify(done)


def test_a_run_without_a_record_says_which_stage_writes_it(tmp_path: Path) -> None:
    run_dir = run(ready(tmp_path), until="train", launch=Stages())
    with pytest.raises(RunError, match="RUN-002"):
        verify(run_dir)


def test_a_base_that_changed_while_it_was_trained_gets_no_record(tmp_path: Path) -> None:
    run_dir = run(ready(tmp_path), until="evaluate", launch=Stages())
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(WEIGHTS[:-1] + b"x")
    with pytest.raises(RunError, match=r"REC-001 changed or gone since training began: .*model\.safetensors"):
        carry_on(run_dir, launch=Stages())
    assert not run_dir.record.exists()
    weights.write_bytes(WEIGHTS)  # another time, the same bytes
    assert verify(carry_on(run_dir, launch=Stages())) == 15


def test_files_that_share_their_bytes_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("1")
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").write_text("2")
    read: list[Path] = []
    monkeypatch.setattr(record, "sha256_file", lambda path: read.append(path) or path.read_text())
    assert record.hashes(tmp_path, ["a", "b", "c"]) == {"a": "1", "b": "1", "c": "2"}
    assert len(read) == 2


@pytest.mark.parametrize(
    ("figures", "told"),
    [
        ({}, []),
        (
            {"mean_kl": 0.06},
            [
                "parity: merged and adapter differ by 6.00e-02 nats per token, 2.00e-03 are allowed (rounding explains "
                "2.00e-05, times merge.tolerance=100; export.max_kl=0.05)"
            ],
        ),
        ({"base_kl": 1e-6}, ["parity: merged is as near to the base (1e-06 nats) as to the adapter (1e-05)"]),
        ({"strangers": ["a.weight"]}, ["parity: 1 tensors are not what the adapter makes of them, e.g. a.weight"]),
        ({"other": 1.0}, ["parity: is no proof of a merge: figures are missing or strange"]),
    ],
)
def test_a_proof_beyond_its_limits_is_found(done: RunDir, figures: dict[str, Any], told: list[str]) -> None:
    record, name = read_json(done.record), "merged/parity.json"
    write_json(done.parity, PARITY | figures)
    sha = hashlib.sha256(done.parity.read_bytes()).hexdigest()
    write_json(done.record, record | {"parity": PARITY | figures, "outputs": record["outputs"] | {name: sha}})
    assert differences(done) == told


def test_a_licence_rule_that_an_export_breaks_is_found_with_its_source(tmp_path: Path) -> None:
    recipe = ready(tmp_path, model__licence="qwen-license", licence__monthly_users=5)
    (tmp_path / "base" / "LICENSE").write_text("Terms that nobody here has read.")
    sha = hashlib.sha256((tmp_path / "base" / "LICENSE").read_bytes()).hexdigest()
    recipe.licence.accept = sha
    run_dir = run(recipe, launch=Stages())
    assert differences(run_dir) == []
    (tmp_path / "base" / "LICENSE").write_text("Other terms.")
    found = differences(run_dir)
    assert f"{tmp_path / 'base' / 'LICENSE'} has changed" in found
    assert any(
        phrase.startswith("LIC-007 the text of LICENSE beside the weights is not known here") for phrase in found
    )


def test_the_record_of_the_same_run_says_the_same_but_for_when_it_was_written(done: RunDir, tmp_path: Path) -> None:
    from finetune.compose import read_recipe

    again = content(done, read_recipe(done.recipe), tmp_path / "base")
    told = read_json(done.record)
    assert json.loads(json.dumps(again)) | {"written": ""} == told | {"written": ""}
    assert told["recipe"] == dataclasses.asdict(read_recipe(done.recipe))
