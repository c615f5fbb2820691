"""The packages of a lock as files, fetched with their hashes held, and the program itself as one: `wheels(...)`."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from finetune.bundle.verify import BundleError
from finetune.fetch.child import NO_NETWORK, last_line, run_child
from finetune.rundir import sha256_file

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, where this program runs from one."""
QUIET = ("--no-input", "--disable-pip-version-check", "--progress-bar=off", "--retries=2")


def lock_of_program() -> Path:
    """requirements.lock of this checkout. Raises BundleError BND-004 where there is none."""
    path = ROOT / "requirements.lock"
    if path.is_file() and (ROOT / "pyproject.toml").is_file():
        return path
    what = "this program was installed without its locks"
    raise BundleError(
        "BND-004", what, "wheels are packed by the lock of a checkout", "bundle.wheels=false, or a checkout"
    )


def fetch_locked(lock: Path, folder: Path) -> None:
    """Every package of a lock into `folder`, its bytes checked by pip against the lock. Raises BundleError BND-005."""
    _pip(
        ["download", "--no-deps", "--no-build-isolation", "--require-hashes", "-d", str(folder), "-r", str(lock)],
        folder,
    )


def fetch_torch(lock: Path, folder: Path) -> str:
    """torch, in the build that pip finds here, with what it needs beyond the lock. Returns a lock of these files.

    Their hashes are those of the files that came: a lock for every platform has none for them.
    """
    pins = re.findall(r"^([A-Za-z0-9._-]+==\S+)", lock.read_text(encoding="utf-8"), re.MULTILINE)
    constraints = folder.parent / "constraints.txt"
    constraints.write_text("\n".join(pins) + "\n", encoding="utf-8")
    before = set(folder.iterdir())
    wanted = next(str(r) for r in map(Requirement, metadata.requires("finetune") or []) if r.name == "torch")
    # What the lock has is found in the folder and not fetched again.
    where = ["--find-links", str(folder), "-d", str(folder), "-c", str(constraints)]
    _pip(["download", "--no-build-isolation", *where, wanted], folder)
    return pinned(sorted(set(folder.iterdir()) - before))


def build_program(folder: Path) -> Path:
    """The wheel of this checkout in `folder`. Raises BundleError BND-005."""
    _pip(["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(ROOT)], folder)
    return next(folder.glob("finetune-*.whl"))


def pinned(files: list[Path]) -> str:
    """Lines of a lock: name, version and sha256 of each file."""
    lines = []
    for path in files:
        name, version = path.name.removesuffix(".tar.gz").split("-")[:2]
        lines.append(f"{name.replace('_', '-')}=={version} --hash=sha256:{sha256_file(path)}\n")
    return "".join(lines)


def _pip(words: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    title = f"pip {words[0]}: packages for the bundle"
    code, text = run_child(
        [sys.executable, "-m", "pip", *words, *QUIET[: 2 if words[0] == "wheel" else 4]], {}, title, folder
    )
    if code:
        why = last_line(text, NO_NETWORK) if NO_NETWORK.search(text) else last_line(text)
        raise BundleError("BND-005", f"pip {words[0]} could not bring what the lock names", why, "pip config list")
