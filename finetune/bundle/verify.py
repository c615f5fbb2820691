"""Whether a bundle is what was packed: `verify(path)`. Needs the standard library only, and unpacks nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from finetune.errors import FinetuneError

MANIFEST = "bundle.json"
"""File that names every other one with its size and sha256."""
SUMS = "SHA256SUMS"
"""The same in the form of `sha256sum`, for a machine without this program. It lists the manifest, which names it."""
BLOCK = 8 * 2**20
LARGEST_MANIFEST = 64 * 2**20


class BundleError(FinetuneError):
    """A bundle that cannot be made, or that is not what was packed."""


@dataclass(slots=True)
class Seen:
    """What lies in a bundle."""

    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Name -> size in bytes and sha256."""
    strange: list[str] = field(default_factory=list)
    """A phrase for everything that is no plain file below the bundle."""
    manifest: bytes = b""
    """The bytes of the manifest."""


def verify(path: Path, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """The manifest of a bundle of which every file is as it was packed, and nothing else is in it.

    `path`: a folder or a tar file, of which nothing is unpacked. Raises BundleError: BND-001 it is no bundle, BND-002
    with the name of everything that was changed, is missing, was added, is a link or would be written outside.
    """
    if path.is_dir():
        seen = _folder(path, say)
    elif path.is_file():
        seen = _tar(path, say)
    else:
        raise BundleError("BND-001", f"{path} is not here", "a folder or a tar file was expected", "bundle verify PATH")
    manifest = _manifest(path, seen)
    wanted = manifest["files"] | {SUMS: _sums(manifest, seen.manifest)}
    found = [*seen.strange, *_differences(wanted, seen.files)]
    if found:
        shown = "\n".join(f"  {line}" for line in found[:50])
        more = f"\n  and {len(found) - 50} more" if len(found) > 50 else ""
        what = f"{path} is not what was packed:\n{shown}{more}"
        raise BundleError("BND-002", what, "", "copy it again from where it was made")
    return manifest


def unsafe(name: str) -> bool:
    """Whether a name would lead outside, or is not written in the one way that names are."""
    path = PurePosixPath(name)
    plain = not any(c in name for c in "\\\0\r\n") and str(path) == name
    return not plain or path.is_absolute() or ".." in path.parts or name == "."


def sums_text(files: dict[str, str], manifest: bytes) -> str:
    """What SHA256SUMS says of the files (name -> sha256), and of the manifest that lists them."""
    every = files | {MANIFEST: hashlib.sha256(manifest).hexdigest()}
    return "".join(f"{sha256}  {name}\n" for name, sha256 in every.items())


def digest(handle: IO[bytes], said: Callable[[int], None] = lambda count: None) -> tuple[int, str]:
    """(bytes, hex sha256) of what is left to read."""
    value, size = hashlib.sha256(), 0
    while block := handle.read(BLOCK):
        value.update(block)
        size += len(block)
        said(len(block))
    return size, value.hexdigest()


def _folder(top: Path, say: Callable[[str], None]) -> Seen:
    seen = Seen()
    for path in _walk(top):
        name = path.relative_to(top).as_posix()
        kind = path.lstat().st_mode
        if stat.S_ISLNK(kind):
            seen.strange.append(f"{name} is a link")
        elif stat.S_ISDIR(kind):
            continue
        elif not stat.S_ISREG(kind):
            seen.strange.append(f"{name} is no plain file")
        else:
            # Opened so that a link which takes its place meanwhile is not followed.
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            with os.fdopen(handle, "rb") as file:
                if name == MANIFEST:
                    seen.manifest = file.read(LARGEST_MANIFEST)
                else:
                    seen.files[name] = digest(file)
            say(name)
    return seen


def _walk(top: Path) -> Iterator[Path]:
    """Everything below a folder, links not followed, sorted."""
    for path in sorted(top.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)


def _tar(path: Path, say: Callable[[str], None]) -> Seen:
    seen = Seen()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = member.name
                if member.size < 0:
                    raise tarfile.ReadError("a member ends before it begins")  # it would be read again without an end
                if unsafe(name):
                    seen.strange.append(f"{name!r} would be written outside, or is no plain name")
                elif member.isdir():
                    continue
                elif not member.isreg() or member.issparse():  # holes are few bytes of a file without an end
                    seen.strange.append(
                        f"{name} is a link" if member.issym() or member.islnk() else f"{name} is no file"
                    )
                elif name in seen.files or (name == MANIFEST and seen.manifest):
                    seen.strange.append(f"{name} is there twice")
                else:
                    _read_member(archive, member, seen)
                    say(name)
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise BundleError("BND-001", f"{path} is no tar file, or it was cut", str(error), "copy it again") from None
    return seen


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo, seen: Seen) -> None:
    file = archive.extractfile(member)
    assert file is not None  # it is a plain file
    if member.name == MANIFEST:
        seen.manifest = file.read(LARGEST_MANIFEST)
    else:
        seen.files[member.name] = digest(file)


def _manifest(path: Path, seen: Seen) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(seen.manifest)
        files = value["files"]
        wrong = [name for name, facts in files.items() if unsafe(name) or not _are_facts(facts)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        what = f"{path} has no {MANIFEST} that can be read"
        raise BundleError("BND-001", what, "", "python -m finetune bundle recipe=NAME out=FOLDER makes one") from None
    if wrong:
        why = "no file of a bundle can be called so, or it is without size and sha256"
        raise BundleError("BND-001", f"{path}/{MANIFEST} names {wrong[0]!r}", why, "copy it again")
    return value


def _are_facts(facts: dict[str, Any]) -> bool:
    return set(facts) == {"bytes", "sha256"} and isinstance(facts["bytes"], int) and isinstance(facts["sha256"], str)


def _sums(manifest: dict[str, Any], written: bytes) -> dict[str, Any]:
    """Size and sha256 that SHA256SUMS has beside this manifest."""
    text = sums_text({name: facts["sha256"] for name, facts in manifest["files"].items()}, written)
    size, sha256 = digest(io.BytesIO(text.encode("utf-8", "replace")))  # a name in JSON may be half a character
    return {"bytes": size, "sha256": sha256}


def _differences(wanted: dict[str, dict[str, Any]], found: dict[str, tuple[int, str]]) -> Iterator[str]:
    for name, facts in sorted(wanted.items()):
        if name not in found:
            yield f"{name} is missing"
        elif found[name] != (facts["bytes"], facts["sha256"]):
            size = (
                f" ({found[name][0]:,} bytes, packed were {facts['bytes']:,})"
                if found[name][0] != facts["bytes"]
                else ""
            )
            yield f"{name} has other bytes{size}"
    for name in sorted(set(found) - set(wanted)):
        yield f"{name} was added"
