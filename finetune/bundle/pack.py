"""`pack(recipe, out)`: writes a bundle as a folder, or as one file where `out` ends in .tar, in one step."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune import __version__, sbom
from finetune.bundle import wheels as pip
from finetune.bundle.contents import Contents, contents, reads_back
from finetune.bundle.install import install_text
from finetune.bundle.verify import BLOCK, MANIFEST, SUMS, BundleError, sums_text, unsafe
from finetune.machine import existing_parent, room
from finetune.recipe import Recipe
from finetune.rundir import TEMPORARY, atomic_file, atomic_folder

SCHEMA = 1
"""Raised when the layout of bundle.json changes."""
ADD = Callable[[str, Path], tuple[int, str]]


def pack(
    recipe: Recipe, out: Path, say: Callable[[str], None], *, wheels: bool = True, lock: Path | None = None
) -> tuple[dict[str, Any], str]:
    """(the manifest, its sha256) of the bundle that is now at `out`: all or nothing is written.

    With `wheels` the program and its packages are in it, fetched by pip with their hashes held: those of this
    checkout's lock, and torch; or those of `lock` alone. Raises FetchError, and BundleError: BND-003 a recipe that
    cannot be packed, BND-004 and BND-005 packages that are not to be had, BND-006 `out` is there, BND-007 no room.
    """
    if out.exists():
        raise BundleError("BND-006", f"out={out} is there already", "nothing is overwritten", "another name")
    if wheels and not recipe.network:
        why = "network=false"
        raise BundleError("BND-005", "pip has to fetch wheels", why, "network=true, or bundle.wheels=false")
    found = contents(recipe)
    parent = existing_parent(out)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=parent) as folder:
        scratch = Path(folder)
        locks = _packages(found, scratch, lock) if wheels else []
        _papers(found, recipe, locks, scratch)
        sizes = {name: path.stat().st_size for name, path in found.files.items()}
        _fits(parent, sum(sizes.values()))
        told = _progress(sum(sizes.values()), say)
        if out.suffix == ".tar":
            with atomic_file(out) as partial, tarfile.open(partial, "w") as archive:
                return _write(found, recipe, lambda name, path: _into_tar(archive, name, path, told))
        with atomic_folder(out) as partial:
            return _write(found, recipe, lambda name, path: _into_folder(partial, name, path, told))


def _packages(found: Contents, scratch: Path, lock: Path | None) -> list[str]:
    """Adds the wheels and their locks. Returns the names of the locks in the order of their installation."""
    folder = scratch / "wheels"
    given = lock or pip.lock_of_program()
    locks = {}
    if not lock:
        build = given.parent / "scripts" / "build.lock"
        pip.fetch_locked(build, folder)
        locks["build.lock"] = build.read_text(encoding="utf-8")
    pip.fetch_locked(given, folder)
    locks["requirements.lock"] = given.read_text(encoding="utf-8")
    if not lock:
        locks["torch.lock"] = pip.fetch_torch(given, folder)
    locks["program.lock"] = pip.pinned([pip.build_program(folder)])
    found.texts |= locks
    found.files |= {f"wheels/{path.name}": path for path in sorted(folder.iterdir())}
    return list(locks)


def _papers(found: Contents, recipe: Recipe, locks: list[str], scratch: Path) -> None:
    """Adds what is written for the reader, and puts every text into a file."""
    licence = pip.ROOT / "LICENSE"
    if licence.is_file():
        found.files["licences/LICENSE"] = licence
    found.texts["licences/packages.json"] = json.dumps(sbom.licences(), indent=2) + "\n"
    found.texts["sbom.cdx.json"] = json.dumps(sbom.bom(__version__), indent=2, ensure_ascii=False) + "\n"
    parts = sorted({name.partition("/")[0] for name in found.files} & {"base", "cache", "rows"})
    facts = {
        "title": f"finetune: {recipe.name}, for a site without a network",
        "when": time.strftime("%Y-%m-%d", time.gmtime()),
        "version": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    found.texts["INSTALL.txt"] = install_text(facts, [*parts, "recipes"], found.words, locks)
    for name, text in found.texts.items():
        path = scratch / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        found.files[name] = path
    reads_back(found, scratch / "texts" / "recipes")


def _write(found: Contents, recipe: Recipe, add: ADD) -> tuple[dict[str, Any], str]:
    """Writes every file, then the manifest and the sums."""
    listed: dict[str, dict[str, Any]] = {}
    if odd := sorted(filter(unsafe, found.files)):
        raise BundleError("BND-003", f"{odd[0]!r} cannot be the name of a file in a bundle", "", "rename it")
    for name, path in sorted(found.files.items()):
        size, sha256 = add(name, path)
        listed[name] = {"bytes": size, "sha256": sha256}
    manifest = {
        "schema": SCHEMA,
        "packed": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "finetune": __version__,
        "recipe": recipe.name,
        "words": found.words,
        "python": platform.python_version(),
        "platform": {"system": platform.system(), "machine": platform.machine(), "libc": " ".join(platform.libc_ver())},
        "wheels": any(name.startswith("wheels/") for name in listed),
        "files": listed,
    }
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        path = Path(folder) / MANIFEST
        path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _, sha256 = add(MANIFEST, path)
        sums = sums_text({name: facts["sha256"] for name, facts in listed.items()}, path.read_bytes())
        (Path(folder) / SUMS).write_text(sums, encoding="utf-8")
        add(SUMS, Path(folder) / SUMS)
    return manifest, sha256


class _Read(io.RawIOBase):
    """A file that is hashed while somebody else reads it."""

    def __init__(self, path: Path, told: Callable[[int], None]) -> None:
        self._file, self._told = path.open("rb"), told
        self.sha256, self.size = hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        block = self._file.read(size)
        self.sha256.update(block)
        self.size += len(block)
        self._told(len(block))
        return block

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        super().close()


def _into_folder(top: Path, name: str, path: Path, told: Callable[[int], None]) -> tuple[int, str]:
    target = top / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with _Read(path, told) as source, target.open("xb") as sink:
        while block := source.read(BLOCK):
            sink.write(block)
    return source.size, source.sha256.hexdigest()


def _into_tar(archive: tarfile.TarFile, name: str, path: Path, told: Callable[[int], None]) -> tuple[int, str]:
    info = tarfile.TarInfo(name)  # of no user, without a time: the same files give the same bytes
    info.size = path.stat().st_size
    with _Read(path, told) as source:
        archive.addfile(info, source)
    return source.size, source.sha256.hexdigest()


def _fits(parent: Path, size: int) -> None:
    free, need = shutil.disk_usage(parent).free / 2**30, size * 1.01 / 2**30 + 0.01
    if need > free:
        what = f"the bundle takes {room(need)}, free in {parent} are {room(free)}"
        raise BundleError("BND-007", what, "", "out=/another/disk/FOLDER")


def _progress(total: int, say: Callable[[str], None]) -> Callable[[int], None]:
    """Says how much is written, every twentieth of it where that is more than a moment."""
    done, shown = 0, 0

    def told(count: int) -> None:
        nonlocal done, shown
        done += count
        if total > 2**30 and (now := done * 20 // total) > shown:
            shown = now
            say(f"packing: {done / 2**30:,.1f} of {total / 2**30:,.1f} GiB")

    return told
