"""Whether what was trained and merged is still what the merge has proved: `seal(folder)`, `refuse(run_dir, hashes)`.

merge.json holds a hash of every file of merged/ and of the folder that was merged into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import RunError
from finetune.rundir import RunDir, read_json, sha256_file, write_json

NOTE = "merge.json"
"""The file in merged/ that has the hashes."""
SCHEMA = 2
"""Of that file. Older ones have the hashes of the weights alone."""


def seal(folder: Path) -> None:
    """Adds to merge.json of a merged folder the hash of every file that it has none of yet."""
    told = read_json(folder / NOTE)
    left = [name for name in _names(folder) if name not in told["sha256"]]
    told["sha256"] |= {name: sha256_file(folder / name) for name in left}
    write_json(folder / NOTE, told)


def refuse(run_dir: RunDir, hashes: Mapping[str, str] | None = None) -> None:
    """Nothing, or RunError MRG-015 naming every file that is not what the merge has proved.

    `hashes` are those of the whole run folder, by path in it, where they have been taken already; otherwise the merged
    files and what they were made from are read. Raises RunError RUN-002 when there is no merge.json.
    """
    told = read_json(run_dir.require(run_dir.merged / NOTE, "merge"))
    trained = run_dir.trained
    wrong = [*_changed(run_dir.merged, told["sha256"], hashes)]
    if told["schema"] >= SCHEMA:
        of_trained = [*_changed(trained, told["trained"], hashes)]
        wrong += [*of_trained, *_strangers(run_dir.merged, told["sha256"]), *_strangers(trained, told["trained"])]
        wrong += [] if hashes is None else _copies(run_dir, told, hashes)
    else:
        of_trained = []
    if not wrong:
        return
    what = f"not what the merge has proved: {', '.join(wrong)}"
    again = f"rm -rf {run_dir.merged} {run_dir.export}; python -m finetune report run={run_dir.path}"
    fix = f"the bytes of then, from a copy; or a merge of what is there, proved anew: {again}"
    if of_trained:  # what was evaluated is not there any longer
        fix = f"the bytes of then, from a copy, and python -m finetune report run={run_dir.path}; or a new run"
    raise RunError("MRG-015", what, "they would be passed on as if they were proved", fix)


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith(".") and p.name != NOTE)


def _changed(folder: Path, wanted: Mapping[str, str], hashes: Mapping[str, str] | None) -> Iterator[str]:
    for name, sha in sorted(wanted.items()):
        place = f"{folder.name}/{name}"
        if not (folder / name).is_file():
            yield f"{place} is missing"
        elif (hashes[place] if hashes and place in hashes else sha256_file(folder / name)) != sha:
            yield f"{place} has changed"


def _strangers(folder: Path, wanted: Mapping[str, str]) -> Iterator[str]:
    yield from (f"{folder.name}/{name} was not there" for name in _names(folder) if name not in wanted)


def _copies(run_dir: RunDir, told: dict[str, Any], hashes: Mapping[str, str]) -> Iterator[str]:
    """Weights in export/ that are not those they are a copy of."""
    for format_, wanted in (("hf", told["sha256"]), ("peft", told["trained"])):
        for name, sha in sorted(wanted.items()):
            place = (run_dir.export / format_ / name).relative_to(run_dir.path).as_posix()
            if name.endswith(".safetensors") and place in hashes and hashes[place] != sha:
                yield f"{place} has changed"
