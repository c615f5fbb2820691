"""Training states on disk: written under a temporary name, hashed, read back, renamed. Existence means whole.

    checkpoints/step-000120/manifest.json     step, size and sha256 of every file, and of itself; what the run was
    checkpoints/LATEST                        name of the newest folder

Resuming takes the newest folder whose manifest and files verify, and says which it passed over and why. Nothing here
knows what the files hold.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import RunError
from finetune.rundir import TEMPORARY, fsync, sha256_file

MANIFEST, LATEST = "manifest.json", "LATEST"
FOLDER = re.compile(r"step-(\d{6,})")
SPARE_BYTES = 64 * 2**20
"""Room that a save leaves on the disk."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a checkpoint, as it was in memory when it was written."""

    name: str
    """File name."""
    size: int
    """Bytes."""
    sha256: str
    """Hex digest of the bytes."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that verified."""

    path: Path
    """Its folder."""
    step: int
    """Optimizer updates it comes after."""
    about: dict[str, Any]
    """What its writer said about the run."""


@dataclass(slots=True)
class Found:
    """What `newest` found."""

    checkpoint: Checkpoint | None = None
    """The newest that verified, if any."""
    passed_over: list[str] = field(default_factory=list)
    """A sentence for every newer folder that did not."""
    damaged: set[int] = field(default_factory=set)
    """The steps of these folders."""


def stage(root: Path, step: int, need_bytes: int) -> Path:
    """A new temporary folder for the files of a checkpoint. Raises RunError (DSK-003) when the disk lacks the room."""
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < need_bytes + SPARE_BYTES:
        raise RunError(
            "DSK-003",
            f"{root}: a checkpoint of {need_bytes / 2**20:,.0f} MiB does not fit, free are {free / 2**20:,.0f} MiB",
            "the last one is kept and training stops here",
            "freeing some room, then the same run again with run=",
        )
    staging = root / f"{TEMPORARY}{folder_name(step)}-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    return staging


def put(staging: Path, name: str, data: bytes) -> Entry:
    """Writes one file of a checkpoint to the disk itself, not only into its cache."""
    _write(staging / name, data)
    return Entry(name, len(data), hashlib.sha256(data).hexdigest())


def publish(staging: Path, step: int, entries: Collection[Entry], about: dict[str, Any]) -> Path:
    """Makes a staged folder a checkpoint: manifest, read back, rename, LATEST. An existing one of the step stays.

    Raises RunError (CKP-001) when what is on the disk is not what was written.
    """
    root, files = staging.parent, {entry.name: {"size": entry.size, "sha256": entry.sha256} for entry in entries}
    content = {"step": step, "files": dict(sorted(files.items())), "about": about}
    _write(staging / MANIFEST, _sealed(content))
    if wrong := faults(staging, step):
        shutil.rmtree(staging, ignore_errors=True)
        raise RunError("CKP-001", f"{staging}: {wrong[0]}", "the disk gave back other bytes", "another runs_dir=")
    fsync(staging)
    target = root / folder_name(step)
    if target.exists() and not faults(target, step):
        shutil.rmtree(staging)
    else:
        if target.exists():
            _remove(target)
        os.rename(staging, target)  # noqa: PTH104  # os.rename never replaces a folder that has files
        fsync(root)
    _point(root, target.name)
    return target


def newest(root: Path) -> Found:
    """The newest checkpoint below `root` that verifies, and why newer ones do not. Changes nothing on the disk."""
    found = Found()
    folders = [p for p in root.iterdir() if p.is_dir() and FOLDER.fullmatch(p.name)] if root.is_dir() else []
    for path in sorted(folders, key=_step, reverse=True):
        if wrong := faults(path, _step(path)):
            found.passed_over.append(f"{path.name}: {wrong[0]}")
            found.damaged.add(_step(path))
            continue
        found.checkpoint = Checkpoint(path, _step(path), _manifest(path)["about"])
        break
    return found


def faults(folder: Path, step: int) -> list[str]:
    """A phrase for everything that is wrong with a checkpoint; empty when every byte is as it was written."""
    try:
        manifest = _manifest(folder)
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        types = [(type(size), type(digest)) for size, digest in files.values()]
        if type(manifest["about"]) is not dict or not set(types) <= {(int, str)}:
            return [f"{MANIFEST} is damaged"]
        if manifest["step"] != step:
            return [f"{MANIFEST} is that of step {manifest['step']!r:.40}"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [f"{MANIFEST} is damaged"]
    found = []
    for name, (size, digest) in files.items():
        path = folder / name
        # os.path says no to names that no file can have, where pathlib raises
        if Path(name).name != name or os.path.islink(path) or not os.path.isfile(path):  # noqa: PTH113, PTH114
            found.append(f"{name} is missing")
        elif path.stat().st_size != size:
            found.append(f"{name} has {path.stat().st_size:,} bytes instead of {size:,}")
        elif sha256_file(path) != digest:
            found.append(f"{name} has other bytes than were written")
    return found


def retain(root: Path, keep: int, spare: Collection[int] = (), damaged: Collection[int] = ()) -> None:
    """Removes all but the newest `keep` checkpoints, those of the steps in `spare`, and the one LATEST names.

    Steps in `damaged` do not count as kept; they go when a whole one is newer.
    """
    folders = sorted((p for p in root.iterdir() if p.is_dir() and FOLDER.fullmatch(p.name)), key=_step)
    pointed = latest(root)
    whole = [path for path in folders if _step(path) not in damaged]
    older = whole[: max(0, len(whole) - keep)]
    outdone = [path for path in folders if _step(path) in damaged and whole and _step(path) < _step(whole[-1])]
    for path in [*older, *outdone]:
        if path.name != pointed and _step(path) not in spare:
            _remove(path)


def latest(root: Path) -> str:
    """The folder name in LATEST, or "" without one."""
    try:
        return (root / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def folder_name(step: int) -> str:
    """`step-000120`."""
    return f"step-{step:06d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sealed(content: dict[str, Any]) -> bytes:
    """The manifest's bytes, with a hash of its own content."""
    plain = json.dumps(content, sort_keys=True, allow_nan=False)
    return (json.dumps(content | {"sha256": hashlib.sha256(plain.encode()).hexdigest()}, indent=1) + "\n").encode()


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder. Raises ValueError when it is not what was written."""
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    seal = content.pop("sha256")
    if hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() != seal:
        raise ValueError(f"{folder / MANIFEST} has changed")
    return content


def _point(root: Path, name: str) -> None:
    """Makes LATEST name a folder, in one step."""
    partial = root / f"{TEMPORARY}{LATEST}-{uuid.uuid4().hex[:8]}"
    _write(partial, f"{name}\n".encode())
    os.replace(partial, root / LATEST)  # noqa: PTH105  # beside os.rename above: one place to count file operations
    fsync(root)


def _remove(folder: Path) -> None:
    """Takes a checkpoint away in one step; what is left of it by a kill has a temporary name."""
    doomed = folder.with_name(f"{TEMPORARY}{folder.name}-{uuid.uuid4().hex[:8]}-old")
    os.rename(folder, doomed)  # noqa: PTH104
    shutil.rmtree(doomed)


def _write(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        left = memoryview(data)
        while left:
            done = os.write(handle, left[: 2**30])
            if done == 0:
                raise OSError(errno.EIO, "nothing could be written", str(path))
            left = left[done:]
        os.fsync(handle)
    finally:
        os.close(handle)
