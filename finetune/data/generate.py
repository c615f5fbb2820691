"""The program in which a package's generators run: alone, in a bare interpreter. It imports nothing of ours.

Started by `generated.py` as a file, with a folder of checked files as its working folder. What it may import is the
standard library and what lies in that folder. Standard input: one JSON object with `modules`, `generators` (name ->
settings) and `seeds` (side -> [first, how many]). Standard output: one JSON object a row, in ASCII.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

REFUSED = (
    *("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"),
)
"""Audit events that no generator has a reason for (PEP 578)."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


def main() -> None:
    """Reads the job, runs the generators, writes the rows."""
    job = json.load(sys.stdin)
    confine()
    sys.path.append(str(Path.cwd()))
    for module in job["modules"]:
        importlib.import_module(module)
    datasets = importlib.import_module("reasoning_gym.factory").DATASETS
    for side, (first, count) in sorted(job["seeds"].items()):
        for name, settings in job["generators"].items():
            if name not in datasets:
                raise LookupError(f"no file of the card registers a generator {name}")
            dataset, config = datasets[name]
            made = dataset(config(**tuples(settings), seed=first, size=count))
            for index in range(count):
                item = made[index]
                row = {
                    "side": side,
                    "generator": name,
                    "seed": first + index,
                    "question": item["question"],
                    "answer": item["answer"],
                }
                print(json.dumps(row, sort_keys=True))


def confine() -> None:
    """No network, no other process, no file written or removed, from here on.

    A guard against what a generator should not do by accident, not a cage: Python code that wants out of an audit hook
    gets out. What makes the code trustworthy is that its bytes are pinned.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    sys.addaudithook(refuse)


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Raises PermissionError for what `confine` forbids."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
    loads = event == "ctypes.dlopen" and arguments[0] is not None  # None: sympy imports ctypes for the size of a long
    if writes or loads or event.startswith(REFUSED):
        raise PermissionError(f"a generator may not do this: {event} {arguments[:1]}")


def tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """Lists as tuples, as the defaults of the settings are."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


if __name__ == "__main__":
    main()
