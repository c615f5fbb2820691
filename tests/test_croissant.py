"""croissant.json says what the data stage read and left, none of it in words, and its official reader takes it."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from finetune import events, record
from finetune.compose import read_recipe
from finetune.data.part import rows_schema
from finetune.data.prepare import load_splits, prepare
from finetune.errors import RunError
from finetune.export.croissant import COLUMNS, PARTS, croissant
from finetune.export.papers import write_papers
from finetune.run import run
from finetune.rundir import RunDir, atomic_folder, read_json, write_text
from finetune.verify import findings, verify
from tests.job import Stages, ready
from tests.test_signing import write_key

SECRET = "swordfish"


class Prepared(Stages):
    """`Stages`, of which two are real: the rows, and the papers of an export."""

    def __call__(self, stage: str, run_dir: RunDir) -> None:
        if stage not in ("data", "export"):
            return super().__call__(stage, run_dir)
        if stage == "data":
            return prepare(run_dir)
        recipe = read_recipe(run_dir.recipe)
        with atomic_folder(run_dir.export) as folder:
            write_text(folder / "hf" / "model.safetensors", "merge")  # what `Stages` has merged
            write_papers(run_dir, recipe, Path(recipe.model.source), folder)


def finished(folder: Path, base: Path, **changes: Any) -> RunDir:
    """A run of 24 rows of the user's own, three of them with an address and two the same, with its record."""
    rows = folder / "secret place" / "my rows.jsonl"
    rows.parent.mkdir(parents=True)
    lines = []
    for i in range(24):
        asked = f"{SECRET} number {min(i, 22)}?" + (f" ann{i}@example.org" if i < 3 else "")
        chat = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": f"{SECRET} {('no', 'yes')[i % 2]}"},
        ]
        lines.append({"messages": chat, "choices": [f"{SECRET} no", f"{SECRET} yes"], "group": f"{SECRET} {i}"})
    lines[23] = lines[22]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = {"data__card": "", "data__train_files": [str(rows)], "data__workers": 1, "export__croissant": True}
    recipe = ready(folder, **(own | changes))
    shutil.copytree(base, folder / "base", dirs_exist_ok=True)
    return run(recipe, launch=Prepared())


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, base: Path) -> RunDir:
    """Such a run, signed, with the public key beside its base."""
    folder = tmp_path_factory.mktemp("croissant")
    private, _ = write_key(folder)
    return finished(folder, base, sign=str(private), licence__of_rows="CC-BY-4.0")


@pytest.fixture
def told(done: RunDir) -> Any:
    """Its croissant.json."""
    return read_json(done.export / "croissant.json")


def again(done: RunDir, **source: Any) -> Any:
    """What is written when the rows are from elsewhere: keys of the report's `source` changed."""
    recipe = read_recipe(done.recipe)
    facts = copy.deepcopy(record.derived(done, recipe, Path(recipe.model.source)))
    facts["data"]["source"] |= source
    return croissant("Some-model", done, recipe, facts, record.hashed_inputs(done, recipe, Path(recipe.model.source)))


def record_set(told: Any, name: str) -> Any:
    (found,) = [one for one in told["recordSet"] if one["@id"] == name]
    return found


def test_every_file_that_was_read_or_prepared_stands_in_it_with_its_hash_and_size(done: RunDir, told: Any) -> None:
    places = {path.name: path for path in done.data.iterdir()}
    assert {"train.arrow", "heldout.arrow", "ledger.jsonl", "report.json", "mask.txt"} <= set(places)
    places["my rows.jsonl"] = done.path.parents[2] / "secret place" / "my rows.jsonl"
    files = {file["name"]: file for file in told["distribution"]}
    assert set(files) == set(places)
    for name, file in files.items():
        assert file["sha256"] == hashlib.sha256(places[name].read_bytes()).hexdigest()
        assert file["contentSize"] == f"{places[name].stat().st_size} B"
    assert (done.export / files["train.arrow"]["contentUrl"]).resolve() == places["train.arrow"].resolve()
    assert files["my rows.jsonl"]["contentUrl"] == "my%20rows.jsonl"
    assert files["my rows.jsonl"]["encodingFormat"] == "application/jsonlines"


def test_splits_have_the_size_and_the_columns_of_the_files(done: RunDir, told: Any) -> None:
    splits = load_splits(done)
    for name, rows in (("train", splits.train), ("heldout", splits.heldout)):
        found = record_set(told, name)
        assert [size["value"] for size in found["annotation"]] == [len(rows)] and len(rows)
        assert [field["name"] for field in found["field"]] == rows.column_names
        read = {field["source"]["fileObject"]["@id"] for field in found["field"] if "source" in field}
        assert read == {f"prepared/{name}.arrow"}
    assert [row["splits/name"] for row in record_set(told, "splits")["data"]] == ["train", "heldout"]


def test_the_types_are_those_that_the_data_stage_writes() -> None:
    import pyarrow.types as of

    schema = rows_schema()
    assert [*COLUMNS] == schema.names
    for name, (kind, many, _) in COLUMNS.items():
        found = schema.field(name).type
        assert of.is_list(found) == many
        value = found.value_type if many else found
        assert kind == ("" if of.is_struct(value) else "sc:Text" if of.is_string(value) else "sc:Integer")
    assert tuple(part.name for part in schema.field("messages").type.value_type) == PARTS


def test_no_word_of_a_row_and_no_folder_stands_in_it(done: RunDir) -> None:
    text = (done.export / "croissant.json").read_text(encoding="utf-8")
    classes = read_json(done.data / "report.json")["splits"]["train"]["classes"]
    assert SECRET in (done.data / "train.arrow").read_bytes().decode("utf-8", "replace")
    assert len(classes) == 2 and all(SECRET in answer for answer in classes)  # answers stand in the report
    assert [word for word in (SECRET, "example.org", "secret place", str(done.path.parents[2])) if word in text] == []


def test_it_says_whose_the_rows_are_when_they_were_prepared_and_what_was_done_to_them(done: RunDir, told: Any) -> None:
    (when,) = [e["when"] for e in events.events(done) if (e["what"], e["stage"]) == ("finished", "data")]
    report = read_json(done.data / "report.json")
    assert told["datePublished"] == when
    assert told["license"] == "https://spdx.org/licenses/CC-BY-4.0.html"
    assert told["version"] == f"1.0.0+{report['content_sha256'][:16]}"
    assert not {"url", "creditText", "citeAs", "inLanguage", "creator"} & set(told)  # nobody has said them
    assert "24 rows read" in told["description"]
    assert "Left out: copy 1." in told["rai:dataPreprocessingProtocol"]
    assert told["rai:personalSensitiveInformation"].endswith("Found: email 3; left as it is.")
    assert any("names, addresses" in limit for limit in told["rai:dataLimitations"])


@pytest.mark.parametrize(
    ("policy", "end"), [("redact", "email 3; replaced by its kind."), ("off", "Not looked for."), ("drop", "left out.")]
)
def test_what_was_done_about_personal_data_is_what_was_asked(policy: str, end: str, tmp_path: Path, base: Path) -> None:
    run_dir = finished(tmp_path, base, data__privacy=policy)
    told = read_json(run_dir.export / "croissant.json")
    assert told["rai:personalSensitiveInformation"].endswith(end)
    assert told["license"] == "the user's own"


def test_rows_of_a_card_have_its_package_licence_and_authors(done: RunDir) -> None:
    told = again(
        done,
        kind="package",
        files={"evals 3.0.1.post1": "ab" * 32},
        title="Audit questions",
        licence="MIT",
        attribution="Contributors of Evals",
        note="Thirty rows.",
    )
    package = {file["name"]: file for file in told["distribution"]}["evals 3.0.1.post1"]
    assert package["contentUrl"] == "pkg:pypi/evals@3.0.1.post1" and package["sha256"] == "ab" * 32
    assert told["url"] == package["contentUrl"]
    assert told["creditText"] == told["citeAs"] == "Contributors of Evals"
    assert told["name"] == "Some-model: Audit questions" and "Thirty rows." in told["rai:dataLimitations"]


def test_the_same_run_gives_the_same_bytes(done: RunDir) -> None:
    assert again(done) == again(done)
    told = read_json(done.export / "croissant.json")
    assert again(done) == told | {
        "name": "Some-model: rows of the user's own",
        "rai:dataUseCases": [line.replace("job-0001", "Some-model") for line in told["rai:dataUseCases"]],
    }


def test_a_file_that_has_changed_since_has_no_size(done: RunDir) -> None:
    told = again(done, files={"my rows.jsonl": "cd" * 32, "gone.jsonl": "ef" * 32, "old 2.csv": "12" * 32})
    files = {file["name"]: file for file in told["distribution"]}
    for name in ("my rows.jsonl", "gone.jsonl", "old 2.csv"):
        assert "contentSize" not in files[name] and len(files[name]["sha256"]) == 64


def test_the_record_the_signature_and_the_bill_of_materials_cover_it(done: RunDir, tmp_path: Path) -> None:
    copied = RunDir(tmp_path / "runs" / done.path.name)
    shutil.copytree(done.path, copied.path)
    key = done.path.parents[2] / "key.pub.pem"
    assert verify(copied, key)
    file = copied.export / "croissant.json"
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert read_json(copied.record)["outputs"]["export/croissant.json"] == sha256
    parts = read_json(copied.export / "bom.cdx.json")["metadata"]["component"]["components"]
    assert {part["name"]: part["hashes"][0]["content"] for part in parts}["croissant.json"] == sha256
    assert "`croissant.json`" in (copied.export / "README.md").read_text()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(RunError, match=r"VER-001.*export/croissant.json has changed"):
        verify(copied)
    about = {finding.about: finding.what for finding in findings(copied, key)}
    assert about["file"] == "has changed" and "croissant.json" in about["signature"]


def test_it_is_written_only_where_it_is_asked_for(tmp_path: Path, base: Path) -> None:
    run_dir = finished(tmp_path, base, export__croissant=False)
    assert not (run_dir.export / "croissant.json").exists()
    assert "croissant" not in (run_dir.export / "README.md").read_text()
    assert verify(run_dir)


# --- the official reader: PYTHONPATH=.venv/croissant pytest -m croissant


def read_officially(told: Any) -> Any:
    """The metadata as mlcroissant reads it. Raises its ValidationError."""
    import mlcroissant

    return mlcroissant.Dataset(jsonld=copy.deepcopy(told))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("validation needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.croissant
def test_the_official_reader_finds_no_error_and_reads_what_we_wrote(
    done: RunDir, told: Any, no_network: None, caplog: pytest.LogCaptureFixture
) -> None:
    found = read_officially(told)
    assert found.metadata.issues.errors == set()
    assert [line for line in found.metadata.issues.warnings if "citeAs" not in line] == []  # the user's own rows
    assert "is not standard" not in caplog.text
    assert found.metadata.ctx.conforms_to.value == "http://mlcommons.org/croissant/1.1"
    files = {file.name: (file.sha256, file.content_size) for file in found.metadata.file_objects}
    assert files == {file["name"]: (file["sha256"], file["contentSize"]) for file in told["distribution"]}
    sizes = {one.name: one.annotations[0].value for one in found.metadata.record_sets if one.annotations}
    assert sizes == {name: record_set(told, name)["annotation"][0]["value"] for name in ("train", "heldout")}
    messages = found.metadata.record_sets[1].fields[5]
    assert messages.array_shape_tuple == (-1,) and [part.data_type for part in messages.sub_fields] == [bytes, bytes]
    assert found.metadata.personal_sensitive_information == [told["rai:personalSensitiveInformation"]]
    assert [row["splits/name"] for row in found.records("splits")] == ["train", "heldout"]


@pytest.mark.croissant
def test_rows_of_a_card_give_it_nothing_to_warn_of(done: RunDir, no_network: None) -> None:
    source = {"title": "Audit questions", "licence": "MIT", "attribution": "Contributors of Evals", "note": "Thirty."}
    found = read_officially(again(done, kind="package", files={"evals 3.0.1.post1": "ab" * 32}, **source))
    assert found.metadata.issues.errors == found.metadata.issues.warnings == set()
    assert found.metadata.url == "pkg:pypi/evals@3.0.1.post1"


@pytest.mark.croissant
def test_names_of_files_may_be_any(done: RunDir, no_network: None) -> None:
    names = ["a b/ü#1.jsonl", "x{y}|z.csv", "q?&.parquet", "<i>%20.txt.gz", "back\\slash.md", "no suffix"]
    found = read_officially(again(done, files=dict.fromkeys(names, "ab" * 32)))
    assert found.metadata.issues.errors == set()
    assert [file.name for file in found.metadata.file_objects][-len(names) :] == names


def without_hash(told: Any) -> None:
    del told["distribution"][0]["sha256"]


def without_format(told: Any) -> None:
    del told["distribution"][0]["encodingFormat"]


def of_unknown_type(told: Any) -> None:
    told["recordSet"][1]["field"][0]["dataType"] = "sc:NoSuchType"


def from_nowhere(told: Any) -> None:
    told["recordSet"][1]["field"][0]["source"]["fileObject"]["@id"] = "prepared/nowhere.arrow"


def no_data_set(told: Any) -> None:
    told["@type"] = "sc:Book"


def of_no_version(told: Any) -> None:
    told["conformsTo"] = "http://mlcommons.org/croissant/9.9"


@pytest.mark.croissant
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without_hash, "sha256"),
        (without_format, "encodingFormat"),
        (of_unknown_type, "NoSuchType"),
        (from_nowhere, "nowhere"),
        (no_data_set, "Dataset"),
        (of_no_version, "conformsTo"),
    ],
)
def test_the_official_reader_sees_what_is_wrong(spoil: Any, says: str, told: Any, no_network: None) -> None:
    import mlcroissant

    spoil(told)
    with pytest.raises(mlcroissant.ValidationError, match=says):
        read_officially(told)
