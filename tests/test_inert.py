"""A base as its publisher ships it, with Python files: refused, or trained on without one byte of them being used."""

from __future__ import annotations

import dataclasses
import json
import pickle
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune import check
from finetune.__main__ import main
from finetune.base import load_base
from finetune.compose import load_recipe
from finetune.errors import AdapterError, WeightsError
from finetune.families import FAMILIES
from finetune.foreign import check_folder, kinds, templates
from finetune.inert import MANIFEST, code_in, ignored
from finetune.layouts.plain import read_adapter_config
from finetune.merge import SMALL_FILES
from finetune.recipe import Recipe
from finetune.run import run
from finetune.rundir import RunDir, read_json, sha256_file
from finetune.source import base_folder
from finetune.verify import differences
from tests.job import WEIGHTS, good, ready
from tests.tiny_models import checkpoint

MAP = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"}
DEEP = {"trust_remote_code": True, "a": [{"auto_map": MAP, "b": 1}]}
CONFIG = {"model_type": "mixtral", "auto_map": MAP, "text": DEEP}
KEPT = {"model_type": "mixtral", "text": {"a": [{"b": 1}]}}
TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": ["x.T", None]}, "limit": 1}


def payload(canary: Path) -> str:
    """A Python file that touches the canary when it is imported."""
    return f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"


@pytest.fixture
def recipe(tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe that ignores code, and a base with some. Its template is not tried out: that takes seconds each time."""
    monkeypatch.setattr(templates, "try_out", lambda texts: [""] * len(texts))
    made = ready(tmp_path, model__code="ignore")
    base = Path(made.model.source)
    texts = {"config.json": json.dumps(CONFIG), "tokenizer_config.json": json.dumps(TOKENIZER), MANIFEST: "{}"}
    texts |= {"generation_config.json": '{"top_p":  0.95}', "LICENSE": "Do as you like.", "logo.png": "x"}
    for name, text in texts.items():
        (base / name).write_text(text)
    for name in ("modeling_x.py", "configuration_x.PY", "LICENSE.py"):
        (base / name).write_text(payload(canary))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("{{ messages[0].content }}")
    (base / "additional_chat_templates" / "x.py").write_text(payload(canary))
    (base / "additional_chat_templates" / "x.safetensors").write_bytes(WEIGHTS)
    return made


def told(recipe: Recipe) -> str:
    """The sentence with which the base of a recipe is refused."""
    with pytest.raises(WeightsError) as caught:
        base_folder(recipe)
    return str(caught.value)


def test_the_payload_would_touch_the_canary(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(payload(tmp_path / "touched"))
    runpy.run_path(str(tmp_path / "x.py"))
    assert (tmp_path / "touched").exists()


# --- by default it is refused, and the sentence says what to type ---------------------------------------------------


def test_by_default_python_files_are_refused_with_the_setting_in_the_sentence(recipe: Recipe) -> None:
    recipe.model.code = Recipe().model.code
    sentence = told(recipe)
    assert sentence.startswith("FRN-001") and "modeling_x.py" in sentence and "Try: model.code=ignore" in sentence


def test_and_so_are_keys_without_files(recipe: Recipe) -> None:
    recipe.model.code = Recipe().model.code
    for path in Path(recipe.model.source).rglob("*.[pP][yY]"):
        path.unlink()
    sentence = told(recipe)
    assert sentence.startswith("FRN-003") and "config.json has auto_map" in sentence
    assert "Try: model.code=ignore" in sentence


def test_the_command_line_says_it_before_a_run_begins(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [f"model.source={recipe.model.source}", f"runs_dir={tmp_path / 'r'}", f"cache_dir={tmp_path / 'c'}"]
    assert main(["recipe=legal_quickstart", *places]) == 3
    printed = "".join(capsys.readouterr())
    assert "FRN-001" in printed and "model.code=ignore" in printed and not (tmp_path / "r").exists()


def test_no_setting_is_offered_where_none_helps(recipe: Recipe, tmp_path: Path) -> None:
    recipe.model.code = "refuse"
    (Path(recipe.model.source) / "helper.so").write_bytes(b"x")
    assert "helper.so" in told(recipe) and "model.code" not in told(recipe)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "a" / "x.py").write_text("")
    with pytest.raises(AdapterError) as caught:
        read_adapter_config(tmp_path / "a")
    assert "FRN-001" in str(caught.value) and "model.code" not in str(caught.value)


def test_the_setting_is_refused_where_it_has_no_effect() -> None:
    hub = {"model__source": "org/name", "model__code": "ignore"}
    (sentence,) = check.problems(good(**hub))
    assert sentence.startswith("MOD-009 model.code=ignore has no effect with org/name")
    assert check.problems(good(**hub, model__tiny=True)) == []
    assert "CHK-001 model.code=run is not one of refuse, ignore" in check.problems(good(model__code="run"))[0]


# --- ignored --------------------------------------------------------------------------------------------------------


def test_what_stands_for_the_folder_has_everything_else_and_nothing_of_the_code(recipe: Recipe) -> None:
    base, made = Path(recipe.model.source), base_folder(recipe)
    names = {path.relative_to(made).as_posix() for path in made.rglob("*") if not path.is_dir()}
    settings = {"config.json", "tokenizer_config.json", "generation_config.json"}
    assert names == {*settings, "LICENSE", "model.safetensors", "additional_chat_templates/rag.jinja", MANIFEST}
    assert read_json(made / "config.json") == KEPT
    assert read_json(made / "tokenizer_config.json") == {k: v for k, v in TOKENIZER.items() if k != "auto_map"}
    for name in ("generation_config.json", "LICENSE", "additional_chat_templates/rag.jinja"):
        assert (made / name).read_bytes() == (base / name).read_bytes() and not (made / name).is_symlink()
    assert (made / "model.safetensors").samefile(base / "model.safetensors")
    check_folder(made, WeightsError)  # as strictly as any


def test_the_base_itself_stays_as_it_was(recipe: Recipe) -> None:
    base = Path(recipe.model.source)
    before = {path: path.read_bytes() for path in sorted(base.rglob("*")) if path.is_file()}
    base_folder(recipe)
    assert {path: path.read_bytes() for path in sorted(base.rglob("*")) if path.is_file()} == before


def test_what_was_ignored_is_noted_with_the_hash_that_its_publisher_gave_it(recipe: Recipe) -> None:
    base = Path(recipe.model.source)
    noted = {left["file"]: left for left in ignored(base_folder(recipe))}
    assert set(noted) == {
        *("modeling_x.py", "configuration_x.PY", "LICENSE.py", "additional_chat_templates/x.py"),
        *("config.json", "tokenizer_config.json"),
    }
    assert all(left["sha256"] == sha256_file(base / name) for name, left in noted.items())
    assert noted["config.json"]["keys"] == ["auto_map", "text.a.auto_map", "text.trust_remote_code"]
    assert "keys" not in noted["modeling_x.py"] and ignored(base) == []


def test_what_is_left_out_is_said_once(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    base_folder(recipe)
    printed = capsys.readouterr().err
    assert "modeling_x.py" in printed and "config.json (auto_map, text.a.auto_map, text.trust_remote_code)" in printed
    base_folder(recipe)
    assert "left out" not in capsys.readouterr().err


def test_infinities_and_odd_letters_of_settings_are_kept(recipe: Recipe) -> None:
    path = Path(recipe.model.source) / "config.json"
    path.write_text('{"model_type": "mixtral", "auto_map": {}, "limit": [0.0, Infinity], "name": "\\ud800 \\u00fc"}')
    made = json.loads((base_folder(recipe) / "config.json").read_text())
    assert made == {"model_type": "mixtral", "limit": [0.0, float("inf")], "name": "\ud800 ü"}


def test_a_folder_without_code_is_taken_as_it_is(tmp_path: Path) -> None:
    recipe = ready(tmp_path, model__code="ignore")
    assert base_folder(recipe) == Path(recipe.model.source) and ignored(base_folder(recipe)) == []
    assert not (tmp_path / "cache" / "without-code").exists()


def test_it_is_made_once_and_anew_for_other_settings_papers_and_places(recipe: Recipe, tmp_path: Path) -> None:
    made = base_folder(recipe)
    stamp = (made / MANIFEST).stat().st_mtime_ns
    assert base_folder(recipe) == made and (made / MANIFEST).stat().st_mtime_ns == stamp
    (Path(recipe.model.source) / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 8}))
    other = base_folder(recipe)
    assert other != made and read_json(other / "config.json") == KEPT | {"vocab_size": 8}
    home = Path(recipe.model.source)
    (home / "LICENSE").write_text("Ask first.")
    other = base_folder(recipe)
    assert (other / "LICENSE").read_text() == "Ask first."
    recipe.model.source = str(shutil.copytree(home, tmp_path / "twin" / home.name))
    for own, made in ((Path(recipe.model.source), base_folder(recipe)), (home, other)):
        assert (made / "model.safetensors").readlink() == own / "model.safetensors"


@pytest.mark.parametrize("damage", ["more", "config", "link", "no link", "no manifest", "{", "{}", "[]", "other"])
def test_it_is_made_again_when_it_is_not_as_it_was_made(
    recipe: Recipe, canary: Path, tmp_path: Path, damage: str
) -> None:
    made = base_folder(recipe)
    weights, manifest = made / "model.safetensors", (made / MANIFEST).read_bytes()
    if damage == "more":
        (made / "modeling_x.py").write_text(payload(canary))
    elif damage == "config":
        (made / "config.json").write_text(json.dumps(CONFIG))
    elif damage == "link":
        (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
        weights.unlink()
        weights.symlink_to(tmp_path / "model.safetensors")
    elif damage == "no link":
        weights.unlink()
    elif damage == "no manifest":
        (made / MANIFEST).unlink()
    else:
        (made / MANIFEST).write_text(damage if damage[0] in "{[" else json.dumps(json.loads(manifest) | {"ignored": 0}))
    assert base_folder(recipe) == made and (made / MANIFEST).read_bytes() == manifest
    assert read_json(made / "config.json") == KEPT and not (made / "modeling_x.py").exists()
    assert weights.readlink() == Path(recipe.model.source) / "model.safetensors"


def test_weights_that_are_links_into_the_hubs_own_cache_are_found(recipe: Recipe, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in Path(recipe.model.source).iterdir() if p.is_file())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    recipe.model.source = str(snapshot)
    assert (base_folder(recipe) / "model.safetensors").read_bytes() == WEIGHTS


# --- what is refused all the same -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("pytorch_model.bin", pickle.dumps([1]), "FRN-001"),
        ("helper.so", b"\x7fELF", "FRN-001"),
        ("run.sh", b"#!/bin/sh", "FRN-001"),
        ("play.ipynb", b"{}", "FRN-001"),
        ("modeling_x.pyc", b"x", "FRN-001"),
        ("weights.onnx", b"x", "FRN-001"),
        ("other.py", pickle.dumps([1]), "FRN-007"),
        ("other.py", b"\x7fELF", "FRN-007"),
        ("LICENSE.txt", pickle.dumps([1]), "FRN-007"),
        ("other.json", b"[" * 100_000, "FRN-003"),
        ("other.json", b'{"auto_map": {}, "a": ' + b'{"a": ' * 900 + b"1" + b"}" * 901, "FRN-003"),
    ],
)
def test_pickles_programs_and_lies_are_refused_whatever_the_setting(
    recipe: Recipe, name: str, content: bytes, code: str
) -> None:
    base_folder(recipe)
    (Path(recipe.model.source) / name).write_bytes(content)
    assert told(recipe).startswith(code) and name in told(recipe)


def test_a_python_file_may_begin_as_a_script(recipe: Recipe) -> None:
    (Path(recipe.model.source) / "convert.py").write_text("#!/usr/bin/env python\n")
    assert "convert.py" in {left["file"] for left in ignored(base_folder(recipe))}


def test_a_python_file_that_is_a_link_out_of_the_folder_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("salaries")
    (Path(recipe.model.source) / "other.py").symlink_to(tmp_path / "secret.txt")
    assert told(recipe).startswith("FRN-002") and "other.py" in told(recipe)


@pytest.mark.parametrize("names", [["XForCausalLM"], ["MixtralForCausalLM", "XForCausalLM"], "XForCausalLM"])
def test_an_architecture_that_only_the_publishers_code_has_is_refused_with_the_reason(
    recipe: Recipe, names: Any
) -> None:
    path = Path(recipe.model.source) / "config.json"
    path.write_text(json.dumps(CONFIG | {"architectures": names}))
    sentence = told(recipe)
    assert sentence.startswith("FRN-008") and "architectures=XForCausalLM" in sentence and "no such class" in sentence
    path.write_text(json.dumps(CONFIG | {"architectures": ["MixtralForCausalLM"]}))
    assert base_folder(recipe)


def test_a_tokenizer_that_only_the_publishers_code_has_is_refused_unless_it_is_there_as_data(recipe: Recipe) -> None:
    base = Path(recipe.model.source)
    (base / "tokenizer_config.json").write_text(json.dumps(TOKENIZER | {"tokenizer_class": "XTokenizer"}))
    assert told(recipe).startswith("FRN-008") and "tokenizer_class=XTokenizer" in told(recipe)
    (base / "tokenizer.json").write_text("{}")
    assert base_folder(recipe)


# --- links are believed of this process alone -----------------------------------------------------------------------


def test_a_folder_with_such_links_is_refused_by_a_process_that_has_not_made_it(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = base_folder(recipe)
    monkeypatch.setattr(kinds, "_LINKED", {})
    with pytest.raises(WeightsError, match=r"FRN-002 .*model\.safetensors"):
        check_folder(made, WeightsError)
    assert ignored(made) == []
    recipe.model.source = str(made)  # a stranger's folder may look like ours
    assert told(recipe).startswith("FRN-002")


def test_only_weights_may_be_such_links_and_only_into_the_folder(recipe: Recipe, tmp_path: Path) -> None:
    made = base_folder(recipe)
    (made / "LICENSE").unlink()
    (made / "LICENSE").symlink_to(Path(recipe.model.source) / "LICENSE")
    with pytest.raises(WeightsError, match=r"FRN-002 .*LICENSE"):
        check_folder(made, WeightsError)
    (made / "LICENSE").unlink()
    (tmp_path / "other.safetensors").write_bytes(WEIGHTS)
    (made / "other.safetensors").symlink_to(tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"FRN-002 .*other\.safetensors"):
        check_folder(made, WeightsError)


# --- a whole job ----------------------------------------------------------------------------------------------------

CODE = ("modeling_x.py", "configuration_x.py", "NOTICE_x.py")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its publisher's code, and a canary that it would touch, beside the folder."""
    place = tmp_path_factory.mktemp("shipped")
    base = place / "model"
    shutil.copytree(checkpoint("deepseek_v3"), base)
    for name in ("config.json", "tokenizer_config.json"):
        settings = read_json(base / name)
        kind = {"AutoTokenizer": ["modeling_x.T", None]} if name != "config.json" else MAP
        (base / name).write_text(json.dumps(settings | {"auto_map": kind}))
    for name in CODE:
        (base / name).write_text(payload(place / "canary"))
    return base


def job(base: Path, place: Path, code: str) -> Recipe:
    """A rehearsal's sizes, with this base in place of the one that a rehearsal makes."""
    made = load_recipe("deepseek_v3_legal", "scale=rehearsal", f"runs_dir={place / 'r'}", f"cache_dir={place / 'c'}")
    facts = {"config": dict(FAMILIES["deepseek_v3"].tiny), "download_gib": 0.0, "source": str(base), "tiny": False}
    return dataclasses.replace(made, model=dataclasses.replace(made.model, code=code, **facts))


def test_loading_such_a_base_is_refused_by_default(shipped: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"FRN-001 .*NOTICE_x\.py.*Try: model\.code=ignore"):
        run(job(shipped, tmp_path, "refuse"))
    with pytest.raises(WeightsError, match="FRN-001"):
        load_base(shipped, load_in_4bit=False, precision="fp32")
    assert not (tmp_path / "r").exists() and not (shipped.parent / "canary").exists()


@pytest.fixture(scope="module")
def done(shipped: Path, tmp_path_factory: pytest.TempPathFactory, forked_proofs: None) -> RunDir:
    """A finished run on it."""
    return run(job(shipped, tmp_path_factory.mktemp("done"), "ignore"))


@pytest.mark.slow
def test_a_whole_job_runs_and_nothing_of_the_code(done: RunDir, shipped: Path) -> None:
    assert done.merged.is_dir() and (done.export / "hf").is_dir() and done.report.exists()
    assert not (shipped.parent / "canary").exists(), "the publisher's code was run"


@pytest.mark.slow
def test_nothing_of_the_code_is_in_what_a_job_leaves(done: RunDir) -> None:
    files = [path for path in done.path.rglob("*") if path.is_file()]
    assert len(files) > 30 and not [path for path in files if path.suffix == ".py"]
    for folder in (done.merged, done.export / "hf"):
        for name in ("config.json", "tokenizer_config.json"):
            assert "auto_map" not in (folder / name).read_text(encoding="utf-8")
    for path in files:
        if {done.merged, done.export} & set(path.parents):
            content = path.read_bytes()
            assert b'auto_map"' not in content and b"modeling_x" not in content, path


@pytest.mark.slow
def test_the_record_names_what_was_ignored_and_verifies(done: RunDir, shipped: Path) -> None:
    noted = read_json(done.record)["base"]["ignored"]
    assert {left["file"]: left["sha256"] for left in noted} == {
        name: sha256_file(shipped / name) for name in (*CODE, "config.json", "tokenizer_config.json")
    }
    assert noted == code_in(shipped) and differences(done) == []


@pytest.mark.slow
def test_a_record_that_forgets_it_does_not_verify(done: RunDir, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / done.path.parent.name / done.path.name)
    shutil.copytree(done.path, copy.path)
    told = read_json(copy.record)
    del told["base"]["ignored"]
    copy.record.write_text(json.dumps(told))
    assert any("base" in phrase for phrase in differences(copy))


def test_what_a_merge_copies_would_have_taken_some_of_it(shipped: Path) -> None:
    """Why the folder has another in its place: the patterns of what is copied let a paper's name be code's."""
    found = {path.name for pattern in SMALL_FILES for path in shipped.glob(pattern)}
    assert "NOTICE_x.py" in found
