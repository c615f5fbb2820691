"""Pinned packages, wheels or sources: found in the cache or fetched by pip, their bytes checked on every call."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import sys
import tarfile
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from finetune.fetch import noted
from finetune.fetch.child import NO_NETWORK, FetchError, disk_full, last_line, locked, no_space, run_child, writing
from finetune.rundir import TEMPORARY, atomic_folder, sha256_file

WHEEL, SOURCES = "-*.whl", ".tar.gz"
"""How the file names of the two forms of a package end, after name and version."""


def fetch_package(
    name: str,
    version: str,
    sha256: str,
    *,
    cache: Path,
    network: bool,
    size_mb: float = 0.0,
    licence: str = "",
    form: str = WHEEL,
) -> Path:
    """The wheel, or with `form=SOURCES` the sources, of `name==version`, its bytes checked against `sha256` each time.

    A missing or damaged file is fetched by `pip download` where `network` is true, else FET-001. On a site without a
    network the user copies it into `<cache>/packages`. `size_mb` and `licence` are only for the messages.
    """
    folder = cache / "packages"
    found = find_package(name, version, sha256, cache=cache, form=form)
    if found:
        return found
    if not network:
        raise _not_here(folder, name, version, sha256, size_mb, licence, form)
    with writing(folder), locked(folder / f".lock-{_normal(name)}-{version}"):
        # Another process may have brought it while this one waited.
        found = find_package(name, version, sha256, cache=cache, form=form)
        return found or _pip_download(folder, name, version, sha256, size_mb, form)


def find_package(name: str, version: str, sha256: str, *, cache: Path, form: str = WHEEL) -> Path | None:
    """The file of a package in the cache, if it is there with these bytes."""
    files = _files(cache / "packages", name, version, form)
    return next((path for path in files if sha256_file(path) == sha256), None)


def unpack(sources: Path, below: str, keep: tuple[str, ...], *, cache: Path) -> Path:
    """The folder `below` of a package's sources, unpacked once at `<cache>/extracted/<hash of the sources>`.

    Of its files only those whose path there begins with one of `keep`. Links are left out, and nothing
    is written outside. Raises FetchError FET-007 or FET-008.
    """
    target = cache / "extracted" / sha256_file(sources)[:16] / below
    if target.is_dir():
        return target
    with writing(target.parent), atomic_folder(target) as partial:
        try:
            with tarfile.open(sources) as archive:
                for member in archive:
                    _, _, name = member.name.partition("/")  # the first part is name and version
                    inner = name.removeprefix(f"{below}/")
                    if member.isfile() and inner != name and inner.startswith(keep):
                        member.name = inner
                        archive.extract(member, partial, filter="data")
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            why = str(error) or type(error).__name__
            raise FetchError("FET-008", f"{sources} cannot be read", why, f"remove {sources}") from None
        if not any(partial.iterdir()):
            why = "another version has other files"
            raise FetchError("FET-007", f"{sources.name} has no folder {below}", why, "the version that is pinned")
    return target


def extract(wheel: Path, member: str, *, cache: Path) -> Path:
    """One file of a wheel, unpacked below `<cache>/extracted/<hash of the wheel>`; unpacked again when it is damaged.

    Raises FetchError FET-007 when the wheel has no such file or its name leads elsewhere, FET-008 when it is damaged.
    """
    parts = PurePosixPath(member).parts
    if not parts or PurePosixPath(member).is_absolute() or not {"..", "/"}.isdisjoint(parts) or "\x00" in member:
        what = f"{member!r:.80} is no name of a file in a package"
        raise FetchError("FET-007", what, "it would be written outside the cache", "a path below the package's root")
    with open_wheel(wheel) as archive:
        try:
            info = archive.getinfo(member)
        except KeyError:
            raise FetchError(
                "FET-007",
                f"{wheel.name} has no file {member}",
                "the card or recipe names a file of another version",
                "look at the version beside the name",
            ) from None
        target = cache / "extracted" / sha256_file(wheel)[:16] / member
        if target.is_file() and target.stat().st_size == info.file_size and _crc32(target) == info.CRC:
            return target
        with writing(target.parent):
            partial = target.parent / f"{TEMPORARY}{target.name}-{uuid.uuid4().hex[:8]}"
            try:
                with _member(archive, info, wheel) as source, partial.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                    sink.flush()
                    os.fsync(sink.fileno())
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
    return target


@contextmanager
def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, wheel: Path) -> Iterator[IO[bytes]]:
    """A file of a wheel; what is wrong with the archive becomes FET-008."""
    try:
        with archive.open(info) as source:
            yield source
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
    ) as error:
        why = str(error) or type(error).__name__
        raise FetchError("FET-008", f"{wheel} cannot be read", why, f"remove {wheel} and fetch it again") from None


def open_wheel(wheel: Path) -> zipfile.ZipFile:
    """The wheel as a zip archive. Raises FetchError FET-008 when it is none."""
    try:
        return zipfile.ZipFile(wheel)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise FetchError(
            "FET-008", f"{wheel} cannot be read", str(error), f"remove {wheel} and fetch it again"
        ) from None


def _pip_download(folder: Path, name: str, version: str, sha256: str, size_mb: float, form: str) -> Path:
    """`pip download` into a temporary folder, the hash checked by pip and again here, then renamed into place."""
    partial = folder / f"{TEMPORARY}{_normal(name)}-{version}"
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run: the lock is ours
    (partial / "tmp").mkdir(parents=True)
    try:
        wanted = partial / "requirements.txt"
        wanted.write_text(f"{name}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
        # pip asks the sources' own build system for their metadata, which it fetches too; the hash is of the sources.
        only = "--only-binary=:all:" if form == WHEEL else f"--no-binary={name}"
        words = ["download", "--no-deps", only, "--require-hashes", "--no-input", "--no-cache-dir"]
        words += [
            "--disable-pip-version-check",
            "--progress-bar=off",
            "--retries=2",
            "-d",
            str(partial),
            "-r",
            str(wanted),
        ]
        title = f"fetching {name} {version}" + (f" ({size_mb:g} MB)" if size_mb else "")
        # TMPDIR: pip streams into its temporary folder first, and that is often another, smaller disk.
        log = partial / "hosts"
        pip = noted.watched("runpy.run_module('pip', run_name='__main__', alter_sys=True)", log, words)
        code, text = run_child(pip, {"TMPDIR": str(partial / "tmp")}, title, partial)
        files = list(partial.glob(f"*{form.lstrip('-*')}"))
        if code != 0 or not files:
            raise _pip_error(text, name, version, sha256, folder, form)
        if sha256_file(files[0]) != sha256:
            raise _wrong_hash(name, version, sha256)
        target = folder / files[0].name
        noted.note(folder.parent, f"{name} {version}", {target.name: files[0]}, log)
        files[0].replace(target)
        return target
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _files(folder: Path, name: str, version: str, form: str) -> list[Path]:
    """Files in `folder` whose name says `name`, `version` and the form."""
    found = sorted(folder.glob(f"*{form.lstrip('-*')}")) if folder.is_dir() else []
    parts = [(p, p.name.removesuffix(SOURCES).split("-")) for p in found]
    return [p for p, s in parts if s[1:2] == [version] and _normal(s[0]) == _normal(name)]


def _normal(name: str) -> str:
    """A package name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _not_here(
    folder: Path, name: str, version: str, sha256: str, size_mb: float, licence: str, form: str
) -> FetchError:
    facts = ", ".join(filter(None, [f"{size_mb:g} MB" if size_mb else "", f"licence {licence}" if licence else ""]))
    damaged = _files(folder, name, version, form)
    return FetchError(
        "FET-001",
        f"the package {name} {version}" + (f" ({facts})" if facts else "") + " is not in the cache",
        (f"{damaged[0]} is there but damaged: its sha256 is not {sha256}; " if damaged else "") + "network=false",
        f"network=true, or on a site without a network: copy {_file_name(name, version, form)} "
        f"(sha256 {sha256}) into {folder}",
    )


def _wrong_hash(name: str, version: str, sha256: str) -> FetchError:
    return FetchError(
        "FET-004",
        f"{name} {version} from this package index has other bytes than the recipe expects (sha256 {sha256})",
        "the index serves a changed file, so it was thrown away",
        "another index (pip config), or a wheel that you trust with this sha256",
    )


def _file_name(name: str, version: str, form: str) -> str:
    return f"{name.replace('-', '_')}-{version}{form}"


def _pip_error(text: str, name: str, version: str, sha256: str, folder: Path, form: str) -> FetchError:
    """What pip said, as one of our errors. The order matters: offline it also says `no matching distribution`."""
    wheel = _file_name(name, version, form)
    shape = "wheel" if form == WHEEL else "sources"
    if "No module named pip" in text:
        return FetchError("FET-002", "pip is missing in this Python", sys.executable, f"{sys.executable} -m ensurepip")
    if "DO NOT MATCH THE HASHES" in text:
        return _wrong_hash(name, version, sha256)
    if disk_full(text):
        return no_space(folder)
    if NO_NETWORK.search(text):
        return FetchError(
            "FET-003",
            f"the package index cannot be reached to fetch {name} {version}",
            last_line(text, NO_NETWORK),
            f"check the connection and `pip config list`, or copy {wheel} (sha256 {sha256}) into {folder}",
        )
    if "No matching distribution" in text or "Could not find a version" in text:
        return FetchError(
            "FET-009",
            f"the package index has no {shape} of {name} {version} for this Python and machine",
            last_line(text),
            f"another index (pip config), or copy {wheel} (sha256 {sha256}) into {folder}",
        )
    return FetchError(
        "FET-011", f"pip could not fetch {name} {version}", last_line(text), "mend what pip says and repeat"
    )


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
