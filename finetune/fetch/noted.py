"""What was fetched, when and from which hosts: a line each in the cache's `fetched.jsonl`, for the record of a run."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune import egress
from finetune.rundir import sha256_file

LEDGER = "fetched.jsonl"
"""File in the cache that is only ever added to."""


def watched(program: str, log: Path, words: list[str]) -> list[str]:
    """The words of a Python child that carries out `program` while the hosts it asks for are noted in `log`."""
    # As a file: the child may be a Python that has pip and no package of ours.
    prelude = "import runpy, sys; runpy.run_path(sys.argv.pop(1))['watch'](sys.argv.pop(1))\n"
    return [sys.executable, "-c", prelude + program, str(Path(egress.__file__)), str(log), *words]


def note(cache: Path, what: str, files: Mapping[str, Path], log: Path, known: Mapping[str, str] | None = None) -> None:
    """Adds what has just been fetched to the ledger: every file with its bytes and sha256, and the hosts in `log`.

    `known`: hashes that were taken already.
    """
    entry = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "fetched": what,
        "hosts": egress.hosts(log),
        "files": [
            {"name": name, "bytes": path.stat().st_size, "sha256": known[name] if known else sha256_file(path)}
            for name, path in sorted(files.items())
        ],
    }
    handle = os.open(cache / LEDGER, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        os.fsync(handle)
    finally:
        os.close(handle)


def fetched(cache: Path, after: int = 0) -> list[dict[str, Any]]:
    """The lines of the ledger but for the first `after`; a line that was cut is passed over."""
    path = cache / LEDGER
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[after:] if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            found.append({"fetched": "", "torn": True})
    return found
