"""Hunting by coverage: atheris drives a parser, and an input that breaks it is found and told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import fuzz_guided

ROOT = Path(__file__).resolve().parent.parent
PLANTED = """
import sys
from pathlib import Path
import atheris
import scripts.fuzz
from scripts import fuzz_guided
from tests.fuzzing import Parser

def parse(folder):
    data = (folder / "x").read_bytes()
    if data[:1] == b"F":
        if data[1:2] == b"U":
            if data[2:3] == b"Z":
                {fault}

parser = Parser(name="planted", parse=atheris.instrument_func(parse), seeds=lambda: [{{"x": b"seed"}}], shaped=None)
scripts.fuzz.parsers = lambda: [parser]
fuzz_guided.hunt("planted", Path(sys.argv[1]), ["-max_total_time=60", "-seed=1"])
"""
"""A parser with a fault behind three bytes, which no seed comes near."""


def python(*words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, filter(None, [path, ROOT])))}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_atheris_it_says_what_to_type() -> None:
    done = python("scripts/fuzz_guided.py", "--seconds", "1")
    assert done.returncode == 2
    assert "atheris is not installed" in done.stderr and "-r tests/atheris.lock" in done.stderr


def log(place: Path, text: str) -> Path:
    place.mkdir()
    (place / "log").write_text(text)
    return place


def test_a_hunt_that_died_hung_or_tried_nothing_is_a_crash(tmp_path: Path) -> None:
    said = (
        "#3\tINITED cov: 40 ft: 41 corp: 1/1b\n#900\tNEW    cov: 52 ft: 60 corp: 2/3b\n#1000\tDONE   cov: 52 ft: 60\n"
    )
    assert fuzz_guided.told("p", 0, log(tmp_path / "well", said)) == {
        "inputs": 1000,
        "edges_of_seeds": 40,
        "edges": 52,
        "crashes": [],
    }
    hung = fuzz_guided.told("p", 124, log(tmp_path / "hung", said))
    assert len(hung["crashes"]) == 1 and "ended with 124" in hung["crashes"][0]
    nothing = fuzz_guided.told("p", 0, log(tmp_path / "nothing", "ModuleNotFoundError: No module named 'finetune'\n"))
    assert nothing["crashes"] == ["p: ModuleNotFoundError: No module named 'finetune'"]


@pytest.fixture(scope="module")
def atheris(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the locked atheris."""
    target = tmp_path_factory.mktemp("atheris")
    words = ("-m", "pip", "install", "-q", "--require-hashes", "--no-deps", "--target", str(target))
    done = python(*words, "-r", "tests/atheris.lock")
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.data
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("raise ValueError('deep')", "ValueError: deep"),
        ("(folder.parent.parent / 'out').touch()", "outside its folder"),
    ],
)
def test_a_fault_that_no_seed_comes_near_is_found(atheris: Path, tmp_path: Path, fault: str, told: str) -> None:
    done = python("-c", PLANTED.format(fault=fault), str(tmp_path), path=atheris)
    place = log(tmp_path / "found", done.stdout + done.stderr)
    found = fuzz_guided.told("planted", done.returncode, place)
    assert done.returncode != 0
    assert found["inputs"] > 3 and told in found["crashes"][0], done.stderr[-2000:]


@pytest.mark.data
def test_a_parser_of_ours_is_hunted_in_and_its_edges_are_counted(atheris: Path, tmp_path: Path) -> None:
    out = tmp_path / "told.json"
    words = ("--seconds", "5", "--jobs", "1", "--seed", "3", "--only", "index of an evaluation set", "--out", str(out))
    done = python("scripts/fuzz_guided.py", *words, path=atheris)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(out.read_text())
    (one,) = written["parsers"].values()
    assert one["inputs"] > 100 and one["edges"] >= one["edges_of_seeds"] > 10
    assert written["inputs"] == one["inputs"] and written["versions"]["atheris"] == "3.0.0"
