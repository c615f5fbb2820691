"""A base without its publisher's code: `inert(folder, cache)`, for recipes with `model.code=ignore`.

What reads a base, copies it or hands it to a server is given another folder in its place, in the cache: settings and
papers are copies, without the keys that would load code, weights are links, and Python files are not there. So nobody
further on has to know of the setting, and what is not there cannot be imported, copied or published.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from finetune.errors import WeightsError
from finetune.foreign.configs import find_code, read_settings, settings_files, without_code
from finetune.foreign.kinds import TEMPLATES, WEIGHTS, files_of, is_python, is_wanted, let_link, stands_for
from finetune.rundir import atomic_folder, read_json, sha256_file, sha256_tree, write_json, write_text

MANIFEST = "finetune.json"
"""File in a folder we made: what it was made from, and the hash of every file in it."""

Left = dict[str, Any]
"""What was ignored: the name of a `file`, its `sha256`, and of settings the `keys` that were left out."""


def inert(folder: Path, cache: Path) -> Path:
    """The folder itself where nothing in it is code, else one below `cache` that stands for it, made where it is not.

    `foreign.check_folder` has looked at the folder. The other one is made again when anything in it is not as it was
    made, and its name goes by the content of everything but the weights, which may be very large. Raises WeightsError
    (FRN-003) for settings that are nested too deeply to be written without their keys.
    """
    left = code_in(folder)
    if not left:
        return folder
    home = folder.resolve()
    copies = {path.relative_to(folder).as_posix(): path for path in files_of(folder) if _is_copied(path)}
    links = sorted(path.name for path in files_of(folder) if path.suffix == WEIGHTS and path.parent == folder)
    parts = {"ignored": left, "copied": {name: sha256_file(path) for name, path in copies.items()}, "linked": links}
    key = hashlib.sha256(json.dumps([str(home), parts], sort_keys=True).encode()).hexdigest()[:16]
    target = cache / "without-code" / f"{home.name}-{key}"
    if not _is_whole(target, home, parts):
        with atomic_folder(target) as partial:
            for name, path in copies.items():
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, partial / name)
            for path in settings_files(partial):
                if find_code(value := read_settings(path)):
                    _write_without(path, value)
            files = sha256_tree(partial)
            for name in links:
                (partial / name).symlink_to(home / name)
            write_json(partial / MANIFEST, parts | {"files": files})
        names = ", ".join(
            entry["file"] + (f" ({', '.join(entry['keys'])})" if "keys" in entry else "") for entry in left
        )
        print(f"model.code=ignore: left out of {folder}: {names}", file=sys.stderr, flush=True)
    let_link(target, home)
    return target


def code_in(folder: Path) -> list[Left]:
    """What `model.code=ignore` leaves out of a folder, by name: Python files, and keys that would load code."""
    found: list[Left] = [
        {"file": path.relative_to(folder).as_posix(), "sha256": sha256_file(path)}
        for path in files_of(folder)
        if is_python(path)
    ]
    for path in settings_files(folder):
        if keys := find_code(read_settings(path)):
            found.append({"file": path.name, "sha256": sha256_file(path), "keys": sorted(keys)})
    return sorted(found, key=lambda left: str(left["file"]))


def ignored(base: Path) -> list[Left]:
    """What was ignored of the folder that this one stands for; empty where it stands for none."""
    if stands_for(base) is None:
        return []
    left: list[Left] = read_json(base / MANIFEST)["ignored"]
    return left


def _is_copied(path: Path) -> bool:
    wanted = is_wanted(path) if path.parent.name != TEMPLATES else path.suffix == ".jinja"
    return wanted and path.suffix != WEIGHTS and path.name != MANIFEST


def _write_without(path: Path, value: Any) -> None:
    try:
        text = json.dumps(without_code(value), indent=2)  # not `write_json`: published files have infinities, too
    except RecursionError:
        what, why = f"{path.name} has keys that would load code", "it is nested too deeply to be written without them"
        raise WeightsError("FRN-003", what, why, "a copy of the folder without the keys") from None
    write_text(path, text + "\n")


def _is_whole(target: Path, home: Path, parts: dict[str, Any]) -> bool:
    """Whether a folder of ours has every copy and every link, and nothing else."""
    try:
        noted = read_json(target / MANIFEST)
        files, links = noted["files"], parts["linked"]
        there = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
        return (
            {key: noted[key] for key in parts} == parts
            and there == {*files, *links, MANIFEST}
            and all(sha256_file(target / name) == sha256 for name, sha256 in files.items())
            and all((target / name).readlink() == home / name for name in links)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
