"""Whatever bytes stand in a run's folder, `verify` and resuming name what is wrong with it or find nothing."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from finetune import checkpoints, events, verify, votes
from finetune.asking import Answer
from finetune.compose import read_recipe
from finetune.recipe import Recipe
from finetune.run import run
from finetune.rundir import RunDir
from tests.fake_server import answers
from tests.fuzzing import Files, Parser, attempt, dumped, hunt, poked
from tests.job import Stages, ready

# --- manifests ------------------------------------------------------------------------------------------------------

STATE = b"state"
MANIFEST: dict[str, Any] = {
    "step": 3,
    "files": {"a.safetensors": {"size": len(STATE), "sha256": hashlib.sha256(STATE).hexdigest()}},
    "about": {"seed": 1},
}


def sealed(content: Any) -> bytes:
    """A manifest with the right hash of its own content, where it can have one."""
    if not isinstance(content, dict):
        return dumped(content)
    try:
        text = json.dumps(json.loads(dumped(content)), sort_keys=True)
        return dumped(content | {"sha256": hashlib.sha256(text.encode()).hexdigest()})
    except (RecursionError, ValueError):
        return dumped(content)


def manifest(data: bytes) -> Files:
    return {
        "step-000003/manifest.json": data,
        "step-000003/a.safetensors": STATE,
        "step-000002/manifest.json": sealed(MANIFEST | {"step": 2}),
        "step-000002/a.safetensors": STATE,
        "LATEST": b"step-000003\n",
    }


def resume(folder: Path) -> None:
    """As a training looks for the checkpoint that it goes on with."""
    checkpoints.newest(folder)
    checkpoints.latest(folder)


# --- the record -----------------------------------------------------------------------------------------------------

EXAMINED = (
    "run.json",
    "recipe.yaml",
    "events.jsonl",
    "merged/parity.json",
    "scores.json",
    "train.json",
    "data/report.json",
)


@cache
def finished() -> dict[str, bytes]:
    """The files of a finished run whose inputs stand beside it, under names that do not depend on where it is."""
    with tempfile.TemporaryDirectory() as place:
        done = run(ready(Path(place)), launch=Stages())
        files = {p.relative_to(done.path).as_posix(): p.read_bytes() for p in done.path.rglob("*") if p.is_file()}
    return {name: data for name, data in files.items() if name != ".lock"} | {"allowed.json": b"[]\n"}


@cache
def record_seeds() -> list[Files]:
    return [hashed(dict(finished()))]


def hashed(files: Files) -> Files:
    """A run whose record has the hashes of its other files, as whoever makes a false one would."""
    try:
        record = json.loads(files["run.json"])
        record["outputs"] = {
            name: hashlib.sha256(data).hexdigest()
            for name, data in sorted(files.items())
            if name not in ("run.json", "events.jsonl") and not name.startswith("logs/")
        }
        files["run.json"] = json.dumps(record).encode()
    except (ValueError, RecursionError, KeyError, TypeError):
        pass
    return files


def shaped_record(draw: random.Random) -> Files:
    """A run in which one file holds other values, with the right hashes, or whose record does."""
    files = dict(record_seeds()[0])
    name = draw.choice((*EXAMINED, "allowed.json", "run.json", "events.jsonl"))
    if name == "run.json":
        return files | {name: dumped(poked(json.loads(files[name]), draw))}
    if name == "events.jsonl":
        lines = [json.loads(line) for line in files[name].splitlines()]
        return chained(files, poked(lines, draw))
    if name == "recipe.yaml":
        lines = files[name].splitlines(keepends=True)
        at = draw.randrange(len(lines))
        lines[at] = lines[at].partition(b":")[0] + draw.choice(
            (b": []\n", b": 1\n", b": x\n", b": ${seed}\n", b": !!int ''\n")
        )
        return hashed(files | {name: b"".join(lines)})
    value = [{"when": "x", "names": [], "licence": "0" * 64}] if name == "allowed.json" else json.loads(files[name])
    files = hashed(files | {name: dumped(poked(value, draw))})
    if name == "merged/parity.json" and draw.randrange(2):
        record = json.loads(files["run.json"])
        files["run.json"] = dumped(record | {"parity": poked(record["parity"], draw)})
    return files


def chained(files: Files, listed: Any) -> Files:
    """A run whose events follow one another and are those that the record ends with."""
    lines: list[bytes] = []
    for event in listed if isinstance(listed, list) else [listed]:
        if isinstance(event, dict):
            event["before"] = hashlib.sha256(lines[-1]).hexdigest() if lines else events.BEGINNING
        lines.append(dumped(event))
    record = json.loads(files["run.json"])
    record["events"] = {
        "count": len(lines),
        "head": hashlib.sha256(lines[-1]).hexdigest() if lines else events.BEGINNING,
    }
    return files | {"run.json": json.dumps(record).encode(), "events.jsonl": b"\n".join(lines) + b"\n"}


def examine(folder: Path) -> None:
    """As `verify run= --json` reads it and prints what it found."""
    with patch.object(verify, "read_recipe", lambda path: recipe_in(path.read_bytes())):
        json.dumps(verify.as_json(RunDir(folder)), ensure_ascii=False, allow_nan=False).encode("utf-8")


@cache
def recipe_in(text: bytes) -> Recipe:
    """The recipe in a frozen one, read once: what may stand in it is fuzzed with the settings."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "recipe.yaml").write_bytes(text)
        return read_recipe(Path(place) / "recipe.yaml")


# --- recorded answers -----------------------------------------------------------------------------------------------


def judge(folder: Path) -> None:
    """As answers of a server are compared with them."""
    for prompt in votes.recorded(RunDir(folder)):
        votes.judge([votes.vote(prompt, Answer(prompt.tuned, ["a"], [-0.1]))])


PARSERS = [
    Parser(
        name="manifests of checkpoints",
        weight=20,
        examples=[
            (manifest(sealed({"step": 3, "files": {}})), ""),
            (manifest(sealed(MANIFEST | {"files": {"a.safetensors": {"size": "5", "sha256": ""}}})), ""),
            (manifest(sealed(MANIFEST | {"files": {"x" * 300: {"size": 5, "sha256": ""}}})), ""),
            (manifest(b"[" * 9000 + b"]" * 9000), ""),
        ],
        parse=resume,
        seeds=lambda: [manifest(sealed(MANIFEST))],
        shaped=lambda draw: manifest(sealed(poked(MANIFEST, draw))),
    ),
    Parser(name="records and events", weight=0.3, parse=examine, seeds=record_seeds, shaped=shaped_record),
    Parser(
        name="recorded answers",
        weight=20,
        examples=[({"merged/answers.json": dumped(answers(1)).replace(b"-0.4", b"9" * 400)}, "SRV-014")],
        parse=judge,
        seeds=lambda: [{"merged/answers.json": dumped(answers(2))}],
        shaped=lambda draw: {"merged/answers.json": dumped(poked(answers(2), draw))},
    ),
]
EXAMPLES = 50


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
@pytest.mark.parametrize("shaped", [False, True], ids=["bytes", "values"])
def test_a_strange_run_folder_is_named_or_read(parser: Parser, shaped: bool, tmp_path: Path) -> None:
    hunt(parser, tmp_path, EXAMPLES, shaped=shaped)


@pytest.mark.parametrize(
    ("parser", "files", "code"), [(parser, *example) for parser in PARSERS for example in parser.examples]
)
def test_what_once_went_wrong_ends_with_its_sentence(parser: Parser, files: Files, code: str, tmp_path: Path) -> None:
    assert attempt(parser, tmp_path, files) == code
