"""What happened to a run, in order: `note(run_dir, what)`, `stage(run_dir, name)`. Each line holds the last one's hash.

A line that is changed, taken out or put in breaks the chain behind it; run.json holds the hash of its end. Without a
signature (`sign=`) whoever writes all of it anew, run.json too, is not found out.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from finetune import energy
from finetune.errors import FinetuneError, Preempted
from finetune.guard import redacted
from finetune.rundir import RunDir

BEGINNING = "0" * 64
"""What stands for the hash of a last line in the first one."""


def note(run_dir: RunDir, what: str, **facts: Any) -> None:
    """Adds an event to the run's chain. The disk holds it when this returns."""
    with run_dir.events.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        before = file.read()
        torn = bool(before) and not before.endswith(b"\n")  # the machine stopped while it was written
        lines = before.splitlines()
        event = {
            "number": len(lines) + 1,
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "what": what,
            **redacted(facts),
            "before": _hash(lines[-1]) if lines else BEGINNING,
        }
        text = json.dumps(event, ensure_ascii=False, allow_nan=False).encode()
        file.write(b"\n" * torn + text + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def stage(run_dir: RunDir, name: str) -> Iterator[None]:
    """Notes that a stage begins (or goes on) and how it ends, with what the GPUs had used by then."""
    before = any("stage" in event and event["stage"] == name for event in events(run_dir))
    note(run_dir, "continued" if before else "started", stage=name, **energy.reading())
    try:
        yield
    except BaseException as error:
        how = error.code if isinstance(error, FinetuneError) and hasattr(error, "code") else type(error).__name__
        note(
            run_dir, "stopped" if isinstance(error, Preempted) else "failed", stage=name, error=how, **energy.reading()
        )
        raise
    note(run_dir, "finished", stage=name, **energy.reading())


def events(run_dir: RunDir) -> list[dict[str, Any]]:
    """The events of a run; a line that is no JSON (the machine stopped while it was written) is left out."""
    found = []
    for line in _lines(run_dir):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            found.append(event)
    return found


def head(run_dir: RunDir) -> dict[str, Any]:
    """How long the chain is and the hash of its last line."""
    lines = _lines(run_dir)
    return {"count": len(lines), "head": _hash(lines[-1]) if lines else BEGINNING}


def breaks(run_dir: RunDir, recorded: dict[str, Any]) -> list[str]:
    """A phrase for everything that is wrong with the chain, or with its end as it was recorded."""
    lines, found = _lines(run_dir), []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            if event["before"] != (_hash(lines[number - 2]) if number > 1 else BEGINNING):
                found.append(f"event {number} does not follow the line before it")
            elif event["number"] != number:
                found.append(f"event {number} is numbered {event['number']}")
        except (ValueError, KeyError, TypeError, RecursionError):
            if number in (1, len(lines)):
                found.append(f"event {number} is cut or damaged")
    count = recorded["count"]
    if len(lines) != count:
        found.append(f"there are {len(lines)} events, recorded are {count}")
    elif head(run_dir)["head"] != recorded["head"]:
        found.append(f"event {count} is not the one that was recorded")
    return found


def _lines(run_dir: RunDir) -> list[bytes]:
    return run_dir.events.read_bytes().splitlines() if run_dir.events.exists() else []


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
