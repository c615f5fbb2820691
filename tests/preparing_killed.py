"""Rows that are prepared again and again, each time killed at another moment, and then by a process that is left alone.

`python -m tests.preparing_killed ROWS BASE FOLDER` prints a line of JSON for each moment: what the process was about to
do with a file, then the hashes of the set that the next one made, and the names of all else that is left. The first
line has no moment: nothing disturbed that one. Each preparation is a fork.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from finetune.data import files, mapping
from finetune.data.prepare import prepared
from finetune.rundir import sha256_tree
from tests import preparing

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.chmod"}
"""Audit events before which a preparation is killed; of the first only those of files to be written."""


def main(words: list[str]) -> int:
    """One line per moment."""
    rows, base, folder = map(Path, words)
    files.BLOCK_ROWS, mapping.PER_PROCESS = 15, 2
    place, moments = folder / "killed", folder / "moments"
    assert ended(rows, base, place, noted=moments) == 0
    seen = Counter(moments.read_text().splitlines())
    shutil.rmtree(place)
    for moment in ["", *seen]:  # of several like it one in the middle
        if moment:
            assert ended(rows, base, place, moment, seen[moment] // 2 + 1) == -signal.SIGKILL, moment
        assert ended(rows, base, place) == 0, moment
        (made,) = (path.parent for path in place.glob("cache/prepared/[!.]*/seal.json"))
        left = {path for path in place.rglob("*") if path != made and made not in path.parents}
        print(json.dumps([moment, sha256_tree(made), sorted(str(p.relative_to(place)) for p in left)]), flush=True)
        shutil.rmtree(place)
    return 0


def ended(rows: Path, base: Path, place: Path, moment: str = "", nth: int = 0, noted: Path | None = None) -> int:
    """The exit code of a preparation in `place`; it is killed at the `nth` such moment, or notes all in a file."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            prepare(rows, base, place, moment, nth, noted)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def prepare(rows: Path, base: Path, place: Path, moment: str, nth: int, noted: Path | None) -> None:
    """Prepares rows in all stages that there are: near copies, classes in turn and packing among them."""
    (place / "tmp").mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(place / "tmp")
    settings = {"workers": 1, "near_duplicates": "report", "packing": True, "heldout_fraction": 0.3}
    seen: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or (event == "open" and not arguments[2] & os.O_ACCMODE):
            return
        path = Path(arguments[0])
        if path.is_relative_to(place):
            path = (path.parent if event == "os.chmod" else path).relative_to(place)
            name = re.sub(r"[0-9a-f]{6,}|(?<=tmp)[a-z0-9_]{8}$", "N", str(path))
            seen.append(f"{event} {name}")
            if seen[-1] == moment and seen.count(moment) == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    prepared(preparing.recipe(place / "cache", rows, **settings), base)
    if noted:
        noted.write_text("\n".join(list(seen)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
