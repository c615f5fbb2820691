"""SECURITY.md says nothing that cannot be typed, and its figures are those of the committed measurements."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.run import run
from finetune.rundir import RunDir, read_json
from scripts.fuzz import page, parsers
from tests.job import Stages, ready

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
RESULTS = ROOT / "scripts" / "bench_results"


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a line that begins with `heading`, without code marks."""
    below = PAGE.split(f"\n{heading}")[1].split("\n|---", 1)[1].split("\n\n")[0]
    lines = [line for line in below.splitlines()[1:] if line.startswith("| ")]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


COMMANDS = rows("| claim | type | you see |")
TESTS = rows("| claim | TEST |")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: Any) -> RunDir:
    return run(ready(tmp_path_factory.mktemp("audit")), launch=Stages())


@pytest.mark.parametrize(("claim", "command", "seen"), COMMANDS, ids=[claim for claim, _, _ in COMMANDS])
def test_an_auditor_sees_what_the_page_says(
    claim: str, command: str, seen: str, finished: RunDir, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.path, tmp_path / "job" / "0001")
    (tmp_path / "pub.pem").write_text("a key")
    said = ""
    for part in re.split(r"; (?=python -m|echo )", command.strip("`").replace("RUN", "job/0001")):
        said += typed(part, tmp_path, capfd)
    for words in re.findall(r"`([^`]+)`", seen):
        assert words in said, f"{command}\n{said}"


def typed(command: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """What a line says. Verbs of ours run in this process: starting another one takes longer than all they do."""
    import os
    import shlex

    from finetune.__main__ import main

    words = shlex.split(command)
    if words[:3] != ["python", "-m", "finetune"]:
        line = command.replace("python ", f"{sys.executable} ", 1) if words[0] == "python" else command
        if words[:2] == ["echo", "found"]:
            return ""  # said below, with the command before it
        line += "; echo found $?" if words[0] == "grep" else ""
        done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr
    before = Path.cwd()
    os.chdir(folder)
    try:
        capfd.readouterr()
        code = main(words[3:])
        out, err = capfd.readouterr()
    finally:
        os.chdir(before)
    assert (code == 0) == ("files are as recorded" in out), out + err
    return out + err


def test_every_test_that_the_page_names_is_one() -> None:
    assert len(TESTS) >= 10
    for claim, test in TESTS:
        file, name = test.strip("`").split("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), claim


@pytest.mark.skipif(not (RESULTS / "fuzz_cpu.json").is_file(), reason="scripts/fuzz.py has not been run to its end yet")
def test_the_figures_of_the_page_are_those_of_the_committed_files() -> None:
    assert page(read_json(RESULTS / "fuzz_cpu.json"), read_json(RESULTS / "soak_cpu.json")) in PAGE


@pytest.mark.skipif(not (RESULTS / "fuzz_cpu.json").is_file(), reason="scripts/fuzz.py has not been run to its end yet")
def test_every_parser_was_tried_and_nothing_broke() -> None:
    told = read_json(RESULTS / "fuzz_cpu.json")
    assert set(told["parsers"]) == {parser.name for parser in parsers()}
    assert told["inputs"] == sum(p["inputs"] for p in told["parsers"].values()) and told["crashes"] == 0
    assert min(p["inputs"] for p in told["parsers"].values()) > 0 and told["inputs"] >= 200_000
    assert read_json(RESULTS / "soak_cpu.json")["violations"] == []


def test_every_change_is_tried_with_two_hundred_thousand_inputs() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"^\.venv/bin/python scripts/fuzz\.py --inputs 200000 ", ci, re.MULTILINE)


def test_the_page_names_no_person_and_no_address_to_write_to() -> None:
    assert not re.search(r"[\w.]+@[\w.]+", PAGE) and "private security advisory" in PAGE
