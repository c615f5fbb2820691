"""Rows that a pinned package makes: the only cards for which code that was fetched is run.

Which code: the files that the card names, out of the one wheel whose hash stands here, so no card can name other code.
How: in a child process with a bare interpreter (`generate.py`), an empty environment, no network and no writing. What
comes out: bytes whose hash the card states, or nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finetune.data.card import Card
from finetune.data.rows import Row
from finetune.errors import DataError
from finetune.rundir import sha256_file

WHEEL = "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435"
"""reasoning-gym 0.1.25 (Apache-2.0), read before it was pinned. Another version: read its generators first."""

LIBRARIES = ("mpmath", "sympy", "yaml")
"""What its mathematics imports beside the standard library; all three are installed wherever we run."""

MINUTES = 10
"""A child that takes longer is ended. It takes seconds."""


def generated_rows(card: Card, wheel: Path, read: Callable[[str], bytes], members: list[str]) -> list[Row]:
    """The rows of a card's generators, held-out ones first, each with its split; `read` gives a member's bytes.

    A training row with the numbers of a held-out row is dropped, whatever its words. Raises DataError DATA-008 for
    another wheel than ours, DATA-009 when the rows are not those that the card states.
    """
    if sha256_file(wheel) != WHEEL:
        raise DataError(
            "DATA-008",
            f"card {card.name}: {wheel.name} is not the package whose generators may run",
            f"its sha256 must be {WHEEL}",
            "reader: jsonl, for rows that are data",
        )
    text = run_generators(job_of(card, members), {name: read(name) for name in members})
    found = hashlib.sha256(text).hexdigest()
    if found != card.rows_sha256:
        raise DataError(
            "DATA-009",
            f"card {card.name} must give rows of sha256 {card.rows_sha256}, not {found}",
            "its settings or seeds were changed, or sympy prints otherwise than 1.14 did",
            f"the card as it was, or rows_sha256: {found} after a look at the rows",
        )
    files = {Path(name).stem: name for name in members}
    rows = [_row(files, line) for line in text.decode("ascii").splitlines()]
    drop_shared(rows)
    return rows


def job_of(card: Card, members: list[str]) -> dict[str, Any]:
    """What the child is told. Only files that are named like a generator are imported by name."""
    modules = [name.removesuffix(".py").replace("/", ".") for name in members if Path(name).stem in card.generators]
    return {"modules": modules, "generators": card.generators, "seeds": card.seeds}


def run_generators(job: dict[str, Any], files: dict[str, bytes], hash_seed: int = 0) -> bytes:
    """What `generate.py` writes for a job when `files` (path -> bytes) and `LIBRARIES` are all that it can import.

    Without the packages' own `__init__` files the folders are plain namespaces: the code of the other generators, and
    what that needs, is not there. Raises DataError DATA-009 with the child's last line when it fails.
    """
    with TemporaryDirectory(prefix="finetune-") as scratch:
        folder = Path(scratch)
        for name, data in files.items():
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise DataError("DATA-009", f"{name} would be written outside its folder", "", "another package")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        for library in LIBRARIES:
            (folder / library).symlink_to(_folder_of(library))
        # -I would ignore PYTHONHASHSEED; these four and an environment of our own are as strict.
        words = [sys.executable, "-P", "-s", "-S", "-B", str(Path(__file__).with_name("generate.py"))]
        try:
            done = subprocess.run(
                words,
                input=json.dumps(job).encode(),
                capture_output=True,
                cwd=folder,
                env={"PYTHONHASHSEED": str(hash_seed)},
                timeout=60 * MINUTES,
            )
        except subprocess.TimeoutExpired:
            what, fix = f"the generators were ended after {MINUTES} minutes", "the same again when less runs beside it"
            raise DataError("DATA-009", what, "", fix) from None
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise DataError("DATA-009", "the generators stopped", lines[-1], "another card: data=NAME")
    return done.stdout


def _folder_of(library: str) -> Path:
    spec = find_spec(library)
    if spec is None or not spec.origin:
        raise ModuleNotFoundError(f"No module named {library!r}", name=library)
    return Path(spec.origin).parent


def _row(files: dict[str, str], line: str) -> Row:
    value = json.loads(line)
    name, seed = value["generator"], value["seed"]
    record = f"{name}:{seed}"
    return Row(
        file=files[name],
        line=seed,
        id=record,
        sha256=hashlib.sha256(line.encode()).hexdigest(),
        fields={"generator": name, "question": value["question"], "answer": value["answer"], "record": record},
        split=value["side"],
    )


def drop_shared(rows: list[Row]) -> None:
    """Drops training rows that have the numbers of a held-out row, in whatever order, words and kind of exercise.

    Stricter than equal questions: the greatest divisor of 12 and 18 is that of 18 and 12, an equation stays the same
    when its unknown gets another letter, and several generators add.
    """
    held = {numbers(row): row for row in rows if row.split == "heldout"}
    for row in rows:
        same = numbers(row)
        if row.split == "train" and same in held:
            row.drop("near-copy", f"its numbers are those of held-out {held[same].id}")


def numbers(row: Row) -> tuple[str, ...]:
    """The numbers in a question, sorted; digits of other bases (`1f`) count whole."""
    return tuple(sorted(re.findall(r"\d\w*(?:\.\d+)?", row.fields["question"].lower())))
