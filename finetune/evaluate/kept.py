"""Parts of an evaluation that are done, kept until all are: `Kept(folder, of).part(name, make)`.

An evaluation takes hours, and what fails is mostly its last part. Each part is written when it is measured; the same
evaluation, started again, goes on with it. Of other settings, rows, adapter, base or versions it is measured anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.recipe import Recipe
from finetune.record import versions
from finetune.rundir import RunDir, read_json, sha256_tree, write_json
from finetune.source import base_digest


def identity(recipe: Recipe, run_dir: RunDir, base: Path) -> dict[str, Any]:
    """All that decides what an evaluation measures, by hash; of the base the headers, sizes and times of its files.

    A file of the base that was written again is another base here, even where its bytes are the same.
    """
    stats = {path.name: path.stat() for path in sorted(base.iterdir()) if path.is_file()}
    return {
        "finetune": __version__,
        "versions": versions(),
        "settings": dataclasses.asdict(recipe),
        "data": sha256_tree(run_dir.data),
        "adapter": sha256_tree(run_dir.trained),
        "base": [base_digest(base), {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}],
    }


class Kept:
    """The parts of one evaluation in a folder: a JSON file each, with what it is of."""

    def __init__(self, folder: Path, of: dict[str, Any]) -> None:
        self._folder, self._of = folder, of

    def part(self, name: str, make: Callable[[], Any], of: Any = None) -> Any:
        """What `make()` gives, as JSON has it, or what it gave before, where that was of the same.

        `of` is what this part depends on besides. A file that is not what was written is made anew. Raises what `make`
        raises, and ValueError where that has a number which is not finite.
        """
        path, key = self._folder / f"{name}.json", _hash([self._of, of])
        try:
            noted = read_json(path)
            if noted["of"] == key and noted["sha256"] == _hash(noted["value"]):
                print(f"{name}: measured before, {path}", flush=True)
                return noted["value"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # there is none, or none that can be read
        value = json.loads(json.dumps(make(), allow_nan=False))
        write_json(path, {"of": key, "sha256": _hash(value), "value": value})
        return value

    def end(self) -> None:
        """Removes all parts: the evaluation is whole."""
        shutil.rmtree(self._folder, ignore_errors=True)


def measured(name: str, make: Callable[[], Any], of: Any = None) -> Any:
    """What `make()` gives: in place of `Kept.part` where nothing is kept."""
    return make()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
